//! What this processor can do, detected once.
//!
//! Owns the choice of instruction set. Deliberately absent: cache sizes and NUMA topology.

use std::sync::OnceLock;

/// An instruction set for which kernels exist. Ordered: on one architecture, a later one includes
/// the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI, and all of [`Isa::Avx2`].
    Avx512,
    /// Arm, 64 bits: NEON, which every such processor has.
    Neon,
    /// [`Isa::Neon`] with the dot products of bytes (`dotprod`).
    NeonDot,
    /// [`Isa::NeonDot`] with the products of matrices of bytes (`i8mm`).
    NeonI8mm,
}

impl Isa {
    /// The instruction set to use: the best that the processor has, or a lower one when the
    /// environment variable `HEARTH_ISA` names it (`scalar`; on x86-64 `avx2`, `avx512`; on Arm
    /// `neon`, `neon_dot`, `neon_i8mm`).
    /// A name that is unknown or beyond the processor changes nothing.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            chosen(Isa::available(), &std::env::var("HEARTH_ISA").unwrap_or_default())
        })
    }

    /// Every instruction set that this processor can run, worst first. `HEARTH_ISA` has no effect.
    pub fn available() -> &'static [Isa] {
        static AVAILABLE: OnceLock<&'static [Isa]> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let has = |names: &[&str]| {
                let found = features();
                names.iter().all(|name| found.iter().any(|(known, yes)| known == name && *yes))
            };
            if has(&["neon", "dotprod", "i8mm"]) {
                &[Isa::Scalar, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm]
            } else if has(&["neon", "dotprod"]) {
                &[Isa::Scalar, Isa::Neon, Isa::NeonDot]
            } else if has(&["neon"]) {
                &[Isa::Scalar, Isa::Neon]
            } else if !has(&["avx2", "fma", "f16c"]) {
                &[Isa::Scalar]
            } else if !has(&["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"]) {
                &[Isa::Scalar, Isa::Avx2]
            } else {
                &[Isa::Scalar, Isa::Avx2, Isa::Avx512]
            }
        })
    }

    /// The name that `HEARTH_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon_dot",
            Isa::NeonI8mm => "neon_i8mm",
        }
    }
}

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
