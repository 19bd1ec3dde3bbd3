//! Parsers for arguments that are more than a word or a number.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedI64ValueParser;
use frazil_snapstore::Elide;
use frazil_snapstore::retention::parse_within;
use frazil_vmm::dirty::TrackerKind;
use frazil_vmm::disk::DiskConfig;
use frazil_vmm::scheduler::{Every, TIME_MAX};
use frazil_vmm::workload::WorkloadSpec;
use frazil_vmm::{NetConfig, VsockConfig};

use super::SerialArg;

/// The placeholder for a clone's number.
const NUMBER: &str = "{clone}";

/// The text of a tap, socket or disk argument for clone number `index`.
pub(crate) fn numbered(text: &str, index: u32) -> String {
    text.replace(NUMBER, &index.to_string())
}

/// The text of a network card argument for clone number `index`: in the address, the number takes
/// two bytes.
pub(crate) fn numbered_net(text: &str, index: u32) -> String {
    match text.split_once(MAC) {
        Some((on, mac)) => {
            let bytes = format!("{:02x}:{:02x}", index >> 8 & 0xff, index & 0xff);
            format!("{}{MAC}{}", numbered(on, index), mac.replace(NUMBER, &bytes))
        }
        None => numbered(text, index),
    }
}

/// What precedes the address of a network card.
const MAC: &str = ",mac=";

/// Parses a disk: `FILE`, or `FILE,ro` if it is read-only.
pub(super) fn disk(text: &str) -> Result<DiskConfig, String> {
    let (file, read_only) = match text.strip_suffix(",ro") {
        Some(file) => (file, true),
        None => (text, false),
    };
    if file.is_empty() {
        return Err("expected FILE or FILE,ro".into());
    }
    Ok(DiskConfig { file: file.into(), read_only, serial: None })
}

/// Parses `N=FILE`: a disk of a resumed machine, and its new contents.
pub(super) fn disk_replacement(text: &str) -> Result<(usize, PathBuf), String> {
    // With several clones, the parent puts the numbers in: see `clones::run`.
    let text = numbered(text, 1);
    let parts = text.split_once('=').and_then(|(disk, file)| Some((disk.parse().ok()?, file)));
    match parts {
        Some((disk, file)) if !file.is_empty() => Ok((disk, file.into())),
        _ => Err("expected a disk's number and a file, such as 0=FILE".into()),
    }
}

/// Parses a network card: the tap it is connected to, and its address.
pub(super) fn net(text: &str) -> Result<NetConfig, String> {
    let text = numbered_net(text, 1);
    let (on, mac) = match text.split_once(MAC) {
        Some((on, mac)) => (on, Some(mac.parse()?)),
        None => (text.as_str(), None),
    };
    let tap = match on.strip_prefix("tap=") {
        Some(name) if !name.is_empty() => Some(name.to_owned()),
        None if on == "none" => None,
        _ => return Err("expected tap=NAME, tap=NAME,mac=ADDRESS or `none`".into()),
    };
    Ok(NetConfig { tap, mac })
}

/// Parses a socket device: the socket it leads to, and its address.
pub(super) fn vsock(text: &str) -> Result<VsockConfig, String> {
    const EXPECTED: &str = "expected socket=PATH, cid=N,socket=PATH or `none`";
    let text = numbered(text, 1);
    let (cid, on) = match text.strip_prefix("cid=").and_then(|rest| rest.split_once(',')) {
        Some((cid, on)) => (Some(cid.parse().map_err(|_| EXPECTED.to_owned())?), on),
        None => (None, text.as_str()),
    };
    let socket = match on.strip_prefix("socket=") {
        Some(path) if !path.is_empty() => Some(path.into()),
        None if on == "none" => None,
        _ => return Err(EXPECTED.into()),
    };
    Ok(VsockConfig { cid, socket })
}

pub(super) fn at_least_one() -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

pub(super) fn elide(text: &str) -> Result<Elide, String> {
    let mut elide = Elide::NONE;
    match text {
        "all" => return Ok(Elide::default()),
        "none" => return Ok(elide),
        _ => {}
    }
    for name in text.split(',') {
        let switch = match name.trim() {
            "zero" => &mut elide.zero,
            "equal" => &mut elide.equal,
            "dedup" => &mut elide.dedup,
            "delta" => &mut elide.delta,
            other => {
                return Err(format!(
                    "expected `all`, `none`, or some of zero,equal,dedup,delta; found `{other}`"
                ));
            }
        };
        *switch = true;
    }
    Ok(elide)
}

pub(super) fn every(text: &str) -> Result<Every, String> {
    match text {
        "continuous" => Ok(Every::Continuous),
        _ => {
            interval(text).map(Every::Interval).map_err(|wrong| format!("{wrong}, or `continuous`"))
        }
    }
}

pub(super) fn number_or_all(text: &str) -> Result<usize, String> {
    match text {
        "all" => Ok(usize::MAX),
        _ => text.parse().map_err(|_| "expected a number or `all`".into()),
    }
}

pub(super) fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text)
        .map_err(|error| format!("expected a time such as 100ms or 5s ({error})"))?;
    if interval.is_zero() {
        return Err("expected a time longer than zero".into());
    }
    if interval > TIME_MAX {
        return Err("expected at most 100years".into());
    }
    Ok(interval)
}

pub(super) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    match number {
        Some(number) if number.is_finite() && number >= 0.0 => Ok(number / 100.0),
        _ => Err("expected a share such as 5% or 0%".into()),
    }
}

pub(super) fn serial(text: &str) -> Result<SerialArg, String> {
    Ok(match text {
        "stdio" => SerialArg::Stdio,
        "null" => SerialArg::Null,
        "" => return Err("expected `stdio`, `null` or a file".into()),
        path => SerialArg::File(path.into()),
    })
}

/// A range of bytes that begins at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// The address of the first byte.
    pub address: u64,
    /// The length, if one was given.
    pub len_bytes: Option<u64>,
}

/// Parses an address: `0x…` or decimal digits.
pub(super) fn address(text: &str) -> Result<u64, String> {
    let digits = text.trim();
    let parsed = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(&digits.replace('_', ""), 16),
        None => digits.parse(),
    };
    parsed.map_err(|_| format!("expected an address such as 0x1000, found `{text}`"))
}

/// Parses `ADDR` or `ADDR,LEN`; the length is a number, `0x…`, or a size such as 4KiB.
pub(super) fn span(text: &str) -> Result<Span, String> {
    let (at, len) = match text.split_once(',') {
        Some((at, len)) => (at, Some(len)),
        None => (text, None),
    };
    let len_bytes = len.map(|len| address(len).or_else(|_| size(len))).transpose()?;
    if len_bytes == Some(0) {
        return Err("expected a length of 1 or more".into());
    }
    Ok(Span { address: address(at)?, len_bytes })
}

pub(super) fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("expected a size such as 512MiB or 4GiB ({error})"))
}

pub(super) fn tracker(text: &str) -> Result<TrackerKind, String> {
    match text {
        "ring" => Ok(TrackerKind::Ring),
        "manual-bitmap" => Ok(TrackerKind::ManualBitmap),
        "bitmap" => Ok(TrackerKind::Bitmap),
        _ => Err("expected `ring`, `manual-bitmap` or `bitmap`".into()),
    }
}

pub(super) fn within(text: &str) -> Result<Duration, String> {
    parse_within(text)
}

pub(super) fn workload(text: &str) -> Result<WorkloadSpec, String> {
    text.parse::<WorkloadSpec>().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_clone_has_its_number_in_what_is_its_own() {
        assert_eq!(
            numbered("cid=10{clone},socket=/run/{clone}.sock", 12),
            "cid=1012,socket=/run/12.sock"
        );
        assert_eq!(numbered("0=disk{clone}.img", 3), "0=disk3.img");
        let card = "tap=t{clone},mac=02:00:00:00:{clone}";
        assert_eq!(numbered_net(card, 1), "tap=t1,mac=02:00:00:00:00:01");
        assert_eq!(numbered_net(card, 10_000), "tap=t10000,mac=02:00:00:00:27:10");
        assert_eq!(numbered_net("tap=t{clone}", 7), "tap=t7");
        // A single VM counts as the first clone.
        let NetConfig { tap, mac } = net(card).expect("a card");
        let address = mac.expect("an address").to_string();
        assert_eq!((tap.as_deref(), address.as_str()), (Some("t1"), "02:00:00:00:00:01"));
        assert_eq!(vsock("cid=10{clone},socket=s{clone}").expect("sockets").cid, Some(101));
        assert_eq!(disk_replacement("0=d{clone}"), Ok((0, "d1".into())));
        assert!(net("tap=t,mac=02:00:00:00:00:{clone}").is_err(), "seven bytes");
        assert!(vsock("cid=x{clone},socket=s").is_err());
    }
}
