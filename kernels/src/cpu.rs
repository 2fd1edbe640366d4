//! What this processor can do, detected once.
//!
//! Owns the choice of instruction set. Deliberately absent: cache sizes and NUMA topology.

use std::sync::OnceLock;

/// An instruction set for which kernels exist. Ordered: on one architecture, a later one is the
/// better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with the dot products of bytes (AVX-VNNI).
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI, and all of [`Isa::Avx2`]; not always with
    /// AVX-VNNI.
    Avx512,
    /// [`Isa::Avx512`] with the dot products of bf16 (AVX512_BF16).
    Avx512Bf16,
    /// Arm, 64 bits: NEON, which every such processor has.
    Neon,
    /// [`Isa::Neon`] with the dot products of bytes (`dotprod`).
    NeonDot,
    /// [`Isa::NeonDot`] with the products of matrices of bytes (`i8mm`).
    NeonI8mm,
}

impl Isa {
    /// All of them, worst first on either architecture.
    const ALL: [Isa; 8] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512,
        Isa::Avx512Bf16,
        Isa::Neon,
        Isa::NeonDot,
        Isa::NeonI8mm,
    ];

    /// The instruction set to use: the best that the processor has, or a lower one when the
    /// environment variable `HEARTH_ISA` names it (`scalar`; on x86-64 `avx2`, `avx_vnni`,
    /// `avx512`, `avx512_bf16`; on Arm `neon`, `neon_dot`, `neon_i8mm`).
    /// A name that is unknown or beyond the processor changes nothing.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            chosen(Isa::available(), &std::env::var("HEARTH_ISA").unwrap_or_default())
        })
    }

    /// Every instruction set that this processor can run, worst first. `HEARTH_ISA` has no effect.
    pub fn available() -> &'static [Isa] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let found = features();
            among(|wanted| found.iter().any(|(name, yes)| *name == wanted && *yes))
        })
    }

    /// The processor features that its kernels use.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Isa::Scalar => &[],
            Isa::Avx2 => &["avx2", "fma", "f16c"],
            Isa::AvxVnni => &["avx2", "fma", "f16c", "avxvnni"],
            Isa::Avx512 => &AVX512_BF16[1..],
            Isa::Avx512Bf16 => &AVX512_BF16,
            Isa::Neon => &["neon"],
            Isa::NeonDot => &["neon", "dotprod"],
            Isa::NeonI8mm => &["neon", "dotprod", "i8mm"],
        }
    }

    /// The name that `HEARTH_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx_vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512_bf16",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon_dot",
            Isa::NeonI8mm => "neon_i8mm",
        }
    }
}

/// What [`Isa::Avx512Bf16`] needs, and behind the first [`Isa::Avx512`].
const AVX512_BF16: [&str; 9] = [
    "avx512bf16",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vnni",
];

/// The processor features that some kernel uses or may use one day, and whether they are here.
#[cfg(target_arch = "x86_64")]
pub fn features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($($name:tt),* $(,)?) => { vec![$(($name, std::arch::is_x86_feature_detected!($name))),*] };
    }
    detect![
        "avx2",
        "fma",
        "f16c",
        "avxvnni",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vnni",
        "avx512vbmi",
        "avx512bf16",
        "avx512fp16",
    ]
}

/// The processor features that some kernel uses or may use one day, and whether they are here.
#[cfg(target_arch = "aarch64")]
pub fn features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($($name:tt),* $(,)?) => {
            vec![$(($name, std::arch::is_aarch64_feature_detected!($name))),*]
        };
    }
    detect!["neon", "dotprod", "i8mm", "fp16", "bf16", "sve", "sve2"]
}

/// The processor features that some kernel uses or may use one day, and whether they are here.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

/// Those whose features are all there.
fn among(has: impl Fn(&str) -> bool) -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.needs().iter().all(|name| has(name))).collect()
}

/// The one of that name, else the best.
fn chosen(available: &[Isa], name: &str) -> Isa {
    let named = available.iter().find(|isa| isa.name() == name.trim());
    *named.or(available.last()).unwrap_or(&Isa::Scalar)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_is_available_and_scalar_always_is() {
        println!("{:?} of {:?}", Isa::best(), Isa::available());
        assert_eq!(Isa::available()[0], Isa::Scalar);
        assert!(Isa::available().contains(&Isa::best()));
        assert!(Isa::available().is_sorted());
        if let Ok(name) = std::env::var("EXPECTED_ISA") {
            assert_eq!(Isa::available().last().map(|isa| isa.name()), Some(name.as_str()));
        }
    }

    #[test]
    fn features_decide() {
        let of = |names: &str| among(|wanted| names.split(' ').any(|name| name == wanted));
        let avx512 = "avx512f avx512bw avx512dq avx512vl avx512vnni";
        assert_eq!(of(""), [Isa::Scalar]);
        assert_eq!(of("avx2 fma"), [Isa::Scalar]);
        assert_eq!(of("avx2 fma f16c"), [Isa::Scalar, Isa::Avx2]);
        assert_eq!(of("avx2 fma f16c avxvnni"), [Isa::Scalar, Isa::Avx2, Isa::AvxVnni]);
        // AVX-512 has its own products of bytes; a processor need not have the shorter ones too.
        assert_eq!(of(&format!("avx2 fma f16c {avx512}")), [Isa::Scalar, Isa::Avx2, Isa::Avx512]);
        let all = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512];
        assert_eq!(of(&format!("avx2 fma f16c avxvnni {avx512}")), all);
        let all = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];
        assert_eq!(of(&format!("avx2 fma f16c {avx512} avx512bf16")), all);
        assert_eq!(of("avx2 fma f16c avx512f avx512bf16"), [Isa::Scalar, Isa::Avx2]);
        assert_eq!(of("neon i8mm"), [Isa::Scalar, Isa::Neon]);
        assert_eq!(of("neon dotprod"), [Isa::Scalar, Isa::Neon, Isa::NeonDot]);
        let all = [Isa::Scalar, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm];
        assert_eq!(of("neon dotprod i8mm"), all);
    }

    #[test]
    fn environment_lowers_and_never_raises() {
        let (x86, arm) = ([Isa::Scalar, Isa::Avx2, Isa::Avx512], [Isa::Scalar, Isa::Neon]);
        assert_eq!(chosen(&x86, "avx2"), Isa::Avx2);
        assert_eq!(chosen(&x86[..2], "avx512"), Isa::Avx2);
        assert_eq!(chosen(&x86, " scalar "), Isa::Scalar);
        assert_eq!(chosen(&x86, "sse9"), Isa::Avx512);
        assert_eq!(chosen(&x86, ""), Isa::Avx512);
        assert_eq!(chosen(&arm, "avx2"), Isa::Neon);
        assert_eq!(chosen(&arm, "neon_dot"), Isa::Neon);
    }
}
