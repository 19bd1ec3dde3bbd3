//! Finds CPU features that a saved vCPU has and this host lacks.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A CPUID register whose bits are features.
struct List {
    function: u32,
    index: u32,
    register: Register,
    /// Linux's names (`arch/x86/include/asm/cpufeatures.h`), from bit 0 on; `-` for bits without.
    names: &'static str,
    /// Bits that reflect what the guest's system or a VMM did, not what the processor can do.
    ignored: u32,
}

/// Bits of leaf 1, ECX: MONITOR, the TSC deadline timer (which KVM has wherever it has a local
/// APIC), OSXSAVE, and the presence of a hypervisor.
const IGNORED_1_ECX: u32 = 1 << 3 | 1 << 24 | 1 << 27 | 1 << 31;
/// Bits of leaf 7, ECX: OSPKE.
const IGNORED_7_ECX: u32 = 1 << 4;

const LISTS: [List; 11] = [
    List {
        function: 1,
        index: 0,
        register: Register::Edx,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - \
                dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
        ignored: 0,
    },
    List {
        function: 1,
        index: 0,
        register: Register::Ecx,
        names: "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - \
                pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx \
                f16c rdrand hypervisor",
        ignored: IGNORED_1_ECX,
    },
    List {
        function: 7,
        index: 0,
        register: Register::Ebx,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a \
                avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf \
                avx512er avx512cd sha_ni avx512bw avx512vl",
        ignored: 0,
    },
    List {
        function: 7,
        index: 0,
        register: Register::Ecx,
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
                avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - \
                bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
        ignored: IGNORED_7_ECX,
    },
    List {
        function: 7,
        index: 0,
        register: Register::Edx,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect - md_clear - - - \
                serialize - tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 \
                spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
        ignored: 0,
    },
    List {
        function: 7,
        index: 1,
        register: Register::Eax,
        names: "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs - - \
                amx_fp16 - avx_ifma - - lam",
        ignored: 0,
    },
    List {
        function: 0xd,
        index: 0,
        register: Register::Eax,
        names: "xstate_x87 xstate_sse xstate_avx xstate_bndregs xstate_bndcsr xstate_opmask \
                xstate_zmm_hi256 xstate_hi16_zmm - xstate_pkru - - - - - - - xstate_xtilecfg \
                xstate_xtiledata",
        ignored: 0,
    },
    List {
        function: 0xd,
        index: 1,
        register: Register::Eax,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
        ignored: 0,
    },
    List {
        function: 0x8000_0001,
        index: 0,
        register: Register::Edx,
        names: "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp \
                - lm 3dnowext 3dnow",
        ignored: 0,
    },
    List {
        function: 0x8000_0001,
        index: 0,
        register: Register::Ecx,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
                xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - \
                bpext ptsc perfctr_llc mwaitx",
        ignored: 0,
    },
    List {
        function: 0x8000_0008,
        index: 0,
        register: Register::Ebx,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
                amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no",
        ignored: 0,
    },
];

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

impl List {
    /// The register's bits in `cpuid`; 0 if it has no such leaf.
    fn bits(&self, cpuid: &CpuId) -> u32 {
        let is_it = |entry: &&kvm_cpuid_entry2| {
            entry.function == self.function && entry.index == self.index
        };
        cpuid.as_slice().iter().find(is_it).map_or(0, |entry| self.register.of(entry))
    }

    fn name(&self, bit: u32) -> String {
        match self.names.split_ascii_whitespace().nth(bit as usize) {
            Some(name) if name != "-" => name.to_owned(),
            _ => format!("CPUID {:#x}.{}:{:?} bit {bit}", self.function, self.index, self.register),
        }
    }
}

/// The names of the features that `saved` has and `supported` lacks.
#[must_use]
pub fn missing(saved: &CpuId, supported: &CpuId) -> Vec<String> {
    let lacks = |list: &'static List| {
        let bits = list.bits(saved) & !list.bits(supported) & !list.ignored;
        (0..u32::BITS).filter(move |bit| bits >> bit & 1 == 1).map(|bit| list.name(bit))
    };
    LISTS.iter().flat_map(lacks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    #[test]
    fn what_is_missing_is_named() {
        let saved = [
            kvm_cpuid_entry2 { ebx: 1 << 16 | 1 << 5, edx: 1 << 1, ..leaf(7, 0) },
            kvm_cpuid_entry2 { ecx: u32::MAX, ..leaf(1, 0) },
            kvm_cpuid_entry2 { eax: 0xe7, ..leaf(0xd, 0) },
        ];
        let supported = [
            kvm_cpuid_entry2 { ebx: 1 << 5 | 1 << 3, ..leaf(7, 0) },
            kvm_cpuid_entry2 { ecx: !(1 << 28 | IGNORED_1_ECX), ..leaf(1, 0) },
            kvm_cpuid_entry2 { eax: 0x7, ..leaf(0xd, 0) },
        ];
        let [saved, supported] =
            [saved, supported].map(|leaves| CpuId::from_entries(&leaves).unwrap());
        let expected = [
            "avx",
            "avx512f",
            "CPUID 0x7.0:Edx bit 1",
            "xstate_opmask",
            "xstate_zmm_hi256",
            "xstate_hi16_zmm",
        ];
        assert_eq!(missing(&saved, &supported), expected);
        assert!(missing(&supported, &supported).is_empty());
        // A missing leaf has no features.
        assert_eq!(missing(&saved, &CpuId::new(0).unwrap()).len(), expected.len() + 27 + 1 + 3);
    }

    #[test]
    fn every_bit_has_its_place() {
        for list in &LISTS {
            let names = list.names.split_ascii_whitespace().count();
            assert!(names <= 32, "{:#x}.{}:{:?}", list.function, list.index, list.register);
        }
        let name = |function, register, bit| {
            let list =
                LISTS.iter().find(|list| (list.function, list.register) == (function, register));
            list.unwrap().name(bit)
        };
        // From the manuals.
        for (function, register, bit, expected) in [
            (1, Register::Edx, 31, "pbe"),
            (1, Register::Edx, 19, "clflush"),
            (1, Register::Ecx, 31, "hypervisor"),
            (1, Register::Ecx, 21, "x2apic"),
            (7, Register::Ebx, 31, "avx512vl"),
            (7, Register::Ebx, 18, "rdseed"),
            (7, Register::Ecx, 31, "pks"),
            (7, Register::Ecx, 16, "la57"),
            (7, Register::Edx, 31, "spec_ctrl_ssbd"),
            (7, Register::Edx, 20, "ibt"),
            (0x8000_0001, Register::Edx, 31, "3dnow"),
            (0x8000_0001, Register::Edx, 26, "pdpe1gb"),
            (0x8000_0001, Register::Ecx, 29, "mwaitx"),
            (0x8000_0001, Register::Ecx, 22, "topoext"),
            (0x8000_0008, Register::Ebx, 24, "amd_ssbd"),
            (0x8000_0008, Register::Ebx, 12, "amd_ibpb"),
        ] {
            assert_eq!(name(function, register, bit), expected, "{function:#x} {register:?} {bit}");
        }
    }
}
