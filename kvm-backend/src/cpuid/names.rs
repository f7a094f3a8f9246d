//! Which CPUID bits are features, and what they are called (Intel SDM volume 2, CPUID; AMD APM volume 3,
//! appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst` for leaf 0x40000001).

use kvm_bindings::kvm_cpuid_entry2;

use super::{HYPER_THREADING, HYPERVISOR, OSPKE, OSXSAVE};

/// A register that CPUID answers in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

pub(super) const REGISTERS: [Register; 4] = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];

impl Register {
    pub(super) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }
}

/// The bits of a register that are features of the CPU. Left out are counts and sizes, and bits that follow what
/// the guest itself has set up.
pub(super) fn feature_mask(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    use Register::{Eax, Ebx, Ecx, Edx};
    let follows_the_guest = match (entry.function, entry.index, register) {
        (1, _, Ecx) => OSXSAVE | HYPERVISOR,
        (1, _, Edx) => HYPER_THREADING,
        (7, 0, Ecx) => OSPKE,
        _ => 0,
    };
    let holds_features = match (entry.function, entry.index) {
        (1 | 0x8000_0001, _) => matches!(register, Ecx | Edx),
        (7, 0) => register != Eax,
        (7, _) => true,
        (0xd, 0) => matches!(register, Eax | Edx),
        (0xd, 1) => register != Ebx,
        (0x4000_0001 | 0x8000_0021, _) => register == Eax,
        (0x8000_0007, _) => register == Edx,
        (0x8000_0008, _) => register == Ebx,
        _ => false,
    };
    if holds_features { !follows_the_guest } else { 0 }
}

/// A bit in words.
pub(super) fn describe(entry: &kvm_cpuid_entry2, register: Register, bit: u32) -> String {
    let subleaf = if entry.index == 0 { String::new() } else { format!(".{}", entry.index) };
    let place = format!("leaf {:#x}{subleaf} {} bit {bit}", entry.function, register.name());
    match name_of(entry, register, bit) {
        Some(name) => format!("{name} ({place})"),
        None => place,
    }
}

fn name_of(entry: &kvm_cpuid_entry2, register: Register, bit: u32) -> Option<&'static str> {
    let table = TABLES.iter().find(|(leaf, index, in_register, _)| {
        (*leaf, *index, *in_register) == (entry.function, entry.index, register)
    })?;
    table.3.iter().find(|(named, _)| *named == bit).map(|(_, name)| *name)
}

type Table = (u32, u32, Register, &'static [(u32, &'static str)]);

const TABLES: [Table; 12] = [
    (
        1,
        0,
        Register::Ecx,
        &[
            (0, "SSE3"),
            (1, "PCLMULQDQ"),
            (3, "MONITOR"),
            (5, "VMX"),
            (9, "SSSE3"),
            (12, "FMA"),
            (13, "CMPXCHG16B"),
            (17, "PCID"),
            (19, "SSE4.1"),
            (20, "SSE4.2"),
            (21, "x2APIC"),
            (22, "MOVBE"),
            (23, "POPCNT"),
            (24, "TSC-deadline timer"),
            (25, "AES"),
            (26, "XSAVE"),
            (28, "AVX"),
            (29, "F16C"),
            (30, "RDRAND"),
        ],
    ),
    (
        1,
        0,
        Register::Edx,
        &[
            (0, "FPU"),
            (4, "TSC"),
            (5, "MSR"),
            (6, "PAE"),
            (7, "MCE"),
            (8, "CMPXCHG8B"),
            (9, "APIC"),
            (11, "SYSENTER"),
            (12, "MTRR"),
            (13, "PGE"),
            (15, "CMOV"),
            (16, "PAT"),
            (19, "CLFLUSH"),
            (23, "MMX"),
            (24, "FXSR"),
            (25, "SSE"),
            (26, "SSE2"),
        ],
    ),
    (
        7,
        0,
        Register::Ebx,
        &[
            (0, "FSGSBASE"),
            (1, "TSC_ADJUST"),
            (3, "BMI1"),
            (4, "HLE"),
            (5, "AVX2"),
            (7, "SMEP"),
            (8, "BMI2"),
            (9, "ERMS"),
            (10, "INVPCID"),
            (11, "RTM"),
            (16, "AVX512F"),
            (17, "AVX512DQ"),
            (18, "RDSEED"),
            (19, "ADX"),
            (20, "SMAP"),
            (21, "AVX512-IFMA"),
            (23, "CLFLUSHOPT"),
            (24, "CLWB"),
            (28, "AVX512CD"),
            (29, "SHA"),
            (30, "AVX512BW"),
            (31, "AVX512VL"),
        ],
    ),
    (
        7,
        0,
        Register::Ecx,
        &[
            (1, "AVX512-VBMI"),
            (2, "UMIP"),
            (3, "PKU"),
            (6, "AVX512-VBMI2"),
            (7, "CET shadow stacks"),
            (8, "GFNI"),
            (9, "VAES"),
            (10, "VPCLMULQDQ"),
            (11, "AVX512-VNNI"),
            (12, "AVX512-BITALG"),
            (14, "AVX512-VPOPCNTDQ"),
            (16, "5-level paging"),
            (22, "RDPID"),
            (25, "CLDEMOTE"),
            (27, "MOVDIRI"),
            (28, "MOVDIR64B"),
        ],
    ),
    (
        7,
        0,
        Register::Edx,
        &[
            (4, "FSRM"),
            (8, "AVX512-VP2INTERSECT"),
            (10, "MD_CLEAR"),
            (14, "SERIALIZE"),
            (16, "TSXLDTRK"),
            (20, "CET indirect branch tracking"),
            (22, "AMX-BF16"),
            (23, "AVX512-FP16"),
            (24, "AMX-TILE"),
            (25, "AMX-INT8"),
            (26, "IBRS and IBPB"),
            (27, "STIBP"),
            (28, "L1D_FLUSH"),
            (29, "ARCH_CAPABILITIES"),
            (31, "SSBD"),
        ],
    ),
    (
        7,
        1,
        Register::Eax,
        &[
            (4, "AVX-VNNI"),
            (5, "AVX512-BF16"),
            (10, "FZRM"),
            (11, "FSRS"),
            (12, "FSRC"),
            (21, "AMX-FP16"),
            (23, "AVX-IFMA"),
        ],
    ),
    (
        0xd,
        0,
        Register::Eax,
        &[
            (1, "XSAVE of SSE state"),
            (2, "XSAVE of AVX state"),
            (5, "XSAVE of AVX-512 masks"),
            (6, "XSAVE of AVX-512 upper halves"),
            (7, "XSAVE of AVX-512 registers 16 to 31"),
            (9, "XSAVE of PKRU"),
            (17, "XSAVE of AMX configuration"),
            (18, "XSAVE of AMX tiles"),
        ],
    ),
    (0xd, 1, Register::Eax, &[(0, "XSAVEOPT"), (1, "XSAVEC"), (2, "XGETBV with ECX 1"), (3, "XSAVES"), (4, "XFD")]),
    (
        0x4000_0001,
        0,
        Register::Eax,
        &[
            (0, "KVM clock (old)"),
            (3, "KVM clock"),
            (4, "KVM asynchronous page faults"),
            (5, "KVM steal time"),
            (6, "KVM paravirtual EOI"),
            (7, "KVM paravirtual unhalt"),
            (9, "KVM paravirtual TLB flush"),
            (11, "KVM paravirtual IPIs"),
            (12, "KVM poll control"),
            (13, "KVM paravirtual yield"),
            (14, "KVM asynchronous page faults by interrupt"),
            (24, "KVM stable clock"),
        ],
    ),
    (
        0x8000_0001,
        0,
        Register::Ecx,
        &[
            (0, "LAHF in 64-bit mode"),
            (2, "SVM"),
            (5, "LZCNT"),
            (6, "SSE4A"),
            (8, "PREFETCHW"),
            (11, "XOP"),
            (16, "FMA4"),
            (21, "TBM"),
            (22, "topology extensions"),
            (23, "performance counter extensions"),
        ],
    ),
    (
        0x8000_0001,
        0,
        Register::Edx,
        &[
            (11, "SYSCALL"),
            (20, "NX"),
            (22, "MMX extensions"),
            (25, "FXSR optimisations"),
            (26, "1 GiB pages"),
            (27, "RDTSCP"),
            (29, "64-bit mode"),
        ],
    ),
    (0x8000_0007, 0, Register::Edx, &[(8, "invariant TSC")]),
];
