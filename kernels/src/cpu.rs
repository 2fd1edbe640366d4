//! What this processor can do, detected once.
//!
//! Owns the choice of instruction set. Deliberately absent: cache sizes and NUMA topology.

use std::sync::OnceLock;

/// An instruction set for which kernels exist. Ordered: a later one includes the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI, and all of [`Isa::Avx2`].
    Avx512,
}

impl Isa {
    /// The instruction set to use: the best that the processor has, or a lower one when the
    /// environment variable `HEARTH_ISA` (`scalar`, `avx2`, `avx512`) names it.
    /// A name that is unknown or beyond the processor changes nothing.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let detected = *Isa::available().last().unwrap_or(&Isa::Scalar);
            match std::env::var("HEARTH_ISA") {
                Ok(name) => lowered(detected, &name),
                Err(_) => detected,
            }
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
            if !has(&["avx2", "fma", "f16c"]) {
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
#[cfg(not(target_arch = "x86_64"))]
pub fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

fn lowered(detected: Isa, name: &str) -> Isa {
    [Isa::Scalar, Isa::Avx2, Isa::Avx512]
        .into_iter()
        .find(|isa| isa.name() == name.trim())
        .map_or(detected, |wanted| wanted.min(detected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_is_available_and_scalar_always_is() {
        assert_eq!(Isa::available()[0], Isa::Scalar);
        assert!(Isa::available().contains(&Isa::best()));
        assert!(Isa::available().is_sorted());
    }

    #[test]
    fn environment_lowers_and_never_raises() {
        assert_eq!(lowered(Isa::Avx512, "avx2"), Isa::Avx2);
        assert_eq!(lowered(Isa::Avx2, "avx512"), Isa::Avx2);
        assert_eq!(lowered(Isa::Avx512, " scalar "), Isa::Scalar);
        assert_eq!(lowered(Isa::Avx2, "sse9"), Isa::Avx2);
    }
}
