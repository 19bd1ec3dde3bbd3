//! Packets of the socket device (virtio 1.2, 5.10.6): a header, followed by bytes of a stream.

/// Length of a header in bytes.
pub(super) const HEADER_BYTES: usize = 44;
/// The context id of the host (5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The type of packets that belong to a stream, the only type offered.
pub(super) const STREAM: u16 = 1;
/// Flags of [`Op::Shutdown`]: its sender takes no more, or sends no more (5.10.6.6).
pub(super) const NO_MORE_TAKEN: u32 = 1;
pub(super) const NO_MORE_SENT: u32 = 2;
/// Both of them.
pub(super) const OVER: u32 = NO_MORE_TAKEN | NO_MORE_SENT;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Agrees to a connection.
    Response = 2,
    /// Refuses a connection, or ends it at once.
    Reset = 3,
    /// Ends one or both directions of a connection.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Says how much room its sender has.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    fn numbered(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|op| *op as u16 == number)
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Number of bytes after the header.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// The size of the sender's buffer for the stream in bytes, and how many of the bytes it has
    /// received it has passed on.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let Self { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } =
            self;
        let mut bytes = [0; HEADER_BYTES];
        let parts: [&[u8]; 10] = [
            &src_cid.to_le_bytes(),
            &dst_cid.to_le_bytes(),
            &src_port.to_le_bytes(),
            &dst_port.to_le_bytes(),
            &len.to_le_bytes(),
            &kind.to_le_bytes(),
            &op.to_le_bytes(),
            &flags.to_le_bytes(),
            &buf_alloc.to_le_bytes(),
            &fwd_cnt.to_le_bytes(),
        ];
        bytes.copy_from_slice(&parts.concat());
        bytes
    }

    /// What the packet is for; `None` if that is unknown.
    pub(super) fn op(&self) -> Option<Op> {
        Op::numbered(self.op)
    }

    /// The ports of the host's and the guest's end, for a packet from the guest.
    pub(super) fn ports(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }

    /// Returns the answer to a packet from the guest that there is no such connection.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

/// Identifies a connection, since the context ids of both ends do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub host: u32,
    pub guest: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_laid_out_as_specified() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|at| at as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!((header.src_port, header.dst_port), (0x1312_1110, 0x1716_1514));
        assert_eq!((header.len, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!(header.flags, 0x2322_2120);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (0x2726_2524, 0x2b2a_2928));
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(header.op(), None);
        for number in 0..=9 {
            let found = Op::numbered(number);
            assert_eq!(found.map(|op| op as u16), (1..=7).contains(&number).then_some(number));
        }
    }
}
