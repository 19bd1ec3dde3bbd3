//! Names for the registers that state keeps by number or as bytes, since only the processor's
//! manual says what those mean.
//!
//! Sources: Intel, Software Developer's Manual (SDM), volume 3, table 12-1 (local APIC registers),
//! volume 1, section 13.4 (XSAVE area), volume 4 (MSRs); Linux, `arch/x86/include/asm/kvm_para.h`
//! (KVM's MSRs).

use serde_json::Value;

/// A register that differs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Register {
    pub name: String,
    pub old: String,
    pub new: String,
}

/// The name of a model-specific register.
pub(super) fn msr_name(index: u32) -> Option<&'static str> {
    Some(match index {
        0x10 => "IA32_TIME_STAMP_COUNTER",
        0x1b => "IA32_APIC_BASE",
        0x3a => "IA32_FEATURE_CONTROL",
        0x3b => "IA32_TSC_ADJUST",
        0x48 => "IA32_SPEC_CTRL",
        0x8b => "IA32_BIOS_SIGN_ID",
        0xe1 => "IA32_UMWAIT_CONTROL",
        0xfe => "IA32_MTRRCAP",
        0x10a => "IA32_ARCH_CAPABILITIES",
        0x122 => "IA32_TSX_CTRL",
        0x140 => "MISC_FEATURE_ENABLES",
        0x174 => "IA32_SYSENTER_CS",
        0x175 => "IA32_SYSENTER_ESP",
        0x176 => "IA32_SYSENTER_EIP",
        0x179 => "IA32_MCG_CAP",
        0x17a => "IA32_MCG_STATUS",
        0x17b => "IA32_MCG_CTL",
        0x186 => "IA32_PERFEVTSEL0",
        0x187 => "IA32_PERFEVTSEL1",
        0x188 => "IA32_PERFEVTSEL2",
        0x189 => "IA32_PERFEVTSEL3",
        0x1a0 => "IA32_MISC_ENABLE",
        0x1c4 => "IA32_XFD",
        0x1c5 => "IA32_XFD_ERR",
        0x1d9 => "IA32_DEBUGCTL",
        0x250 => "IA32_MTRR_FIX64K_00000",
        0x277 => "IA32_PAT",
        0x2ff => "IA32_MTRR_DEF_TYPE",
        0x38d => "IA32_FIXED_CTR_CTRL",
        0x38f => "IA32_PERF_GLOBAL_CTRL",
        0x6e0 => "IA32_TSC_DEADLINE",
        0xda0 => "IA32_XSS",
        0xc000_0080 => "IA32_EFER",
        0xc000_0081 => "IA32_STAR",
        0xc000_0082 => "IA32_LSTAR",
        0xc000_0083 => "IA32_CSTAR",
        0xc000_0084 => "IA32_FMASK",
        0xc000_0100 => "IA32_FS_BASE",
        0xc000_0101 => "IA32_GS_BASE",
        0xc000_0102 => "IA32_KERNEL_GS_BASE",
        0xc000_0103 => "IA32_TSC_AUX",
        0xc000_0104 => "AMD64_TSC_RATIO",
        0xc001_011f => "VIRT_SPEC_CTRL",
        0xc001_0015 => "HWCR",
        0x4b56_4d00 => "KVM_WALL_CLOCK_NEW",
        0x4b56_4d01 => "KVM_SYSTEM_TIME_NEW",
        0x4b56_4d02 => "KVM_ASYNC_PF_EN",
        0x4b56_4d03 => "KVM_STEAL_TIME",
        0x4b56_4d04 => "KVM_EOI_EN",
        0x4b56_4d05 => "KVM_POLL_CONTROL",
        0x4b56_4d06 => "KVM_ASYNC_PF_INT",
        0x4b56_4d07 => "KVM_ASYNC_PF_ACK",
        0x11 => "KVM_WALL_CLOCK",
        0x12 => "KVM_SYSTEM_TIME",
        _ => return None,
    })
}

/// The name of the MSR if `path` is of one, such as `msrs[0x10].value`.
pub(super) fn name_of(path: &str) -> Option<&'static str> {
    let (_, rest) = path.split_once("msrs[0x")?;
    let (digits, _) = rest.split_once(']')?;
    msr_name(u32::from_str_radix(digits, 16).ok()?)
}

/// The registers that differ in the field at `path`, if that field keeps registers as bytes.
pub(super) fn registers(path: &str, old: &Value, new: &Value) -> Vec<Register> {
    let field = path.rsplit('.').next().unwrap_or(path);
    let layout: fn(usize) -> Vec<Place> = match field {
        "lapic" => lapic,
        "xsave" => xsave,
        _ => return Vec::new(),
    };
    let bytes = |value: &Value| value.as_str().and_then(bytes);
    let (Some(old), Some(new)) = (bytes(old), bytes(new)) else { return Vec::new() };
    if old.len() != new.len() {
        return Vec::new();
    }
    let differs = |place: &Place| old[place.at..place.end()] != new[place.at..place.end()];
    let register = |place: Place| Register {
        old: place.value(&old),
        new: place.value(&new),
        name: place.name,
    };
    layout(old.len()).into_iter().filter(differs).map(register).collect()
}

fn bytes(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// The place of a register in the bytes.
struct Place {
    name: String,
    at: usize,
    len: usize,
}

impl Place {
    fn end(&self) -> usize {
        self.at + self.len
    }

    /// The value as a number; if it is too long for one, how many of its bytes are not zero.
    fn value(&self, bytes: &[u8]) -> String {
        let bytes = &bytes[self.at..self.end()];
        if bytes.len() > 32 {
            let set = bytes.iter().filter(|byte| **byte != 0).count();
            return format!("{} bytes, {set} not zero", bytes.len());
        }
        let digits: String = bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect();
        let digits = digits.trim_start_matches('0');
        format!("0x{}", if digits.is_empty() { "0" } else { digits })
    }
}

/// Places given as `(name, first byte, length)`, plus the gaps between and after them, so that no
/// difference is left out.
fn places(len: usize, named: impl IntoIterator<Item = (String, usize, usize)>) -> Vec<Place> {
    let mut out = Vec::new();
    let mut at = 0;
    let gap = |from: usize, to: usize| Place {
        name: format!("bytes {from:#x}-{:#x}", to - 1),
        at: from,
        len: to - from,
    };
    for (name, first, width) in named {
        if first < at || first + width > len {
            continue;
        }
        if first > at {
            out.push(gap(at, first));
        }
        out.push(Place { name, at: first, len: width });
        at = first + width;
    }
    if at < len {
        out.push(gap(at, len));
    }
    out
}

/// Registers are 16 bytes apart and 4 bytes long.
fn lapic(len: usize) -> Vec<Place> {
    let single = [
        (0x20, "id"),
        (0x30, "version"),
        (0x80, "tpr"),
        (0x90, "apr"),
        (0xa0, "ppr"),
        (0xb0, "eoi"),
        (0xc0, "rrd"),
        (0xd0, "ldr"),
        (0xe0, "dfr"),
        (0xf0, "svr"),
        (0x280, "esr"),
        (0x2f0, "lvt_cmci"),
        (0x300, "icr_low"),
        (0x310, "icr_high"),
        (0x320, "lvt_timer"),
        (0x330, "lvt_thermal"),
        (0x340, "lvt_performance"),
        (0x350, "lvt_lint0"),
        (0x360, "lvt_lint1"),
        (0x370, "lvt_error"),
        (0x380, "timer_initial_count"),
        (0x390, "timer_current_count"),
        (0x3e0, "timer_divide"),
    ];
    let several = [(0x100, "isr"), (0x180, "tmr"), (0x200, "irr")];
    let banks = several.iter().flat_map(|(first, name)| {
        (0..8).map(move |bank| (first + 16 * bank, format!("{name}{bank}")))
    });
    let mut named: Vec<(usize, String)> =
        single.iter().map(|(at, name)| (*at, (*name).to_owned())).chain(banks).collect();
    named.sort();
    places(len, named.into_iter().map(|(at, name)| (name, at, 4)))
}

/// The legacy area, the header, and the upper halves of vector registers, in the standard format.
/// Where other components are depends on CPUID.
fn xsave(len: usize) -> Vec<Place> {
    let fixed = [
        ("fcw", 0, 2),
        ("fsw", 2, 2),
        ("ftw", 4, 1),
        ("fop", 6, 2),
        ("fip", 8, 8),
        ("fdp", 16, 8),
        ("mxcsr", 24, 4),
        ("mxcsr_mask", 28, 4),
    ];
    let numbered = |name: &'static str, first: usize, count: usize, stride: usize, width: usize| {
        (0..count).map(move |index| (format!("{name}{index}"), first + index * stride, width))
    };
    let named = fixed
        .into_iter()
        .map(|(name, at, width)| (name.to_owned(), at, width))
        .chain(numbered("st", 32, 8, 16, 10))
        .chain(numbered("xmm", 160, 16, 16, 16))
        .chain([("xstate_bv".to_owned(), 512, 8), ("xcomp_bv".to_owned(), 520, 8)])
        .chain(numbered("ymm_high", 576, 16, 16, 16));
    places(len, named)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> Value {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()
    }

    fn names(path: &str, len: usize, changed: &[usize]) -> Vec<String> {
        let old = vec![0; len];
        let mut new = old.clone();
        changed.iter().for_each(|at| new[*at] = 0x80);
        let found = registers(path, &hex(&old), &hex(&new));
        found.into_iter().map(|register| register.name).collect()
    }

    #[test]
    fn bytes_of_registers_have_the_names_of_the_manual() {
        assert_eq!(
            names("lapic", 1024, &[0x80, 0x117, 0x380]),
            ["tpr", "bytes 0x114-0x11f", "timer_initial_count"]
        );
        assert_eq!(names("lapic", 1024, &[0x110, 0x270, 0x3e1]), ["isr1", "irr7", "timer_divide"]);
        assert_eq!(
            names("xsave", 4096, &[24, 160, 399, 512, 576]),
            ["mxcsr", "xmm0", "xmm14", "xstate_bv", "ymm_high0"]
        );
        assert_eq!(names("xsave", 4096, &[5, 4095]), ["bytes 0x5-0x5", "bytes 0x340-0xfff"]);
        assert_eq!(names("data", 16, &[3]), [""; 0]);
    }

    #[test]
    fn nothing_that_differs_is_left_out() {
        for (path, len) in [("lapic", 1024), ("xsave", 4096), ("xsave", 100), ("lapic", 3)] {
            for at in 0..len {
                assert_eq!(names(path, len, &[at]).len(), 1, "{path}, byte {at} of {len}");
            }
        }
    }

    #[test]
    fn values_are_numbers() {
        let (old, mut new) = (vec![0; 4096], vec![0; 4096]);
        new[24..28].copy_from_slice(&[0x80, 0x1f, 0, 0]);
        let found = registers("vcpu.xsave", &hex(&old), &hex(&new));
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].old.as_str(), found[0].new.as_str()), ("0x0", "0x1f80"));
        assert_eq!(registers("lapic", &hex(&[1, 2]), &Value::from("xyz")), []);
        assert_eq!(registers("lapic", &hex(&[1, 2]), &hex(&[1])), []);
    }

    #[test]
    fn msrs_have_names() {
        assert_eq!(name_of("msrs[0x10].value"), Some("IA32_TIME_STAMP_COUNTER"));
        assert_eq!(name_of("msrs[0xc0000080].value"), Some("IA32_EFER"));
        assert_eq!((name_of("msrs[0x999].value"), name_of("regs.rip")), (None, None));
    }
}
