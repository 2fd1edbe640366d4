//! What the loader must know of an architecture: which tensors it asks for, under which names.

use super::{DType, Format, Mix, Role};
use crate::config::{ModelConfig, Naming};

/// A matrix in a tensor of several, `[count, n, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stacked {
    /// Which of them,
    pub index: usize,
    /// and of how many.
    pub count: usize,
    /// Its row 0. Rows of two matrices may stand by turns.
    pub first: usize,
    /// From one of its rows to the next.
    pub every: usize,
    /// Floats stand there as `[count, k, n]`, inputs before outputs, and codes of four bits as they
    /// should.
    pub turned: bool,
}

impl Stacked {
    /// A matrix in a tensor of its own.
    pub(super) const ALONE: Self = Self { index: 0, count: 1, first: 0, every: 1, turned: false };

    /// Its bytes, and those of who stands between its rows.
    pub(super) fn own(self, bytes: &[u8]) -> &[u8] {
        let len = bytes.len() / self.count;
        &bytes[self.index * len..][..len]
    }
}

/// The tensors of one configuration.
pub trait Layout {
    /// What a tensor is for.
    type Role: Copy + PartialEq;

    /// Every weight, in the order in which the model takes them.
    fn roles(&self) -> Vec<Self::Role>;

    /// `[n]` of a norm, `[n, k]` of a matrix with n outputs and k inputs.
    fn shape(&self, role: Self::Role) -> Vec<usize>;

    /// Its name in a file; `suffix` is `weight` or `bias`.
    fn name(&self, role: Self::Role, format: Format, suffix: &str) -> String;

    /// Whether it may stand beside a bias of its own, which is then as long as its outputs.
    fn may_have_bias(&self, role: Self::Role) -> bool;

    /// Whether that bias must not be missing.
    fn needs_bias(&self, role: Self::Role) -> bool;

    /// Head width, where the file has the rows of each head in the order of adjacent pairs.
    fn interleaved(&self, _role: Self::Role) -> Option<usize> {
        None
    }

    /// Where it is, if it is one of several matrices of a tensor.
    fn stacked(&self, _role: Self::Role, _format: Format) -> Option<Stacked> {
        None
    }

    /// Whether the file has a vector as what is to be added to one.
    fn counts_from_one(&self, _role: Self::Role) -> bool {
        false
    }

    /// The type that a mix gives a matrix; `None` where mixes have no word for the architecture.
    fn mixed(&self, _role: Self::Role, _mix: Mix) -> Option<DType> {
        None
    }

    /// Whether products of a matrix decide: its floats are handed out as f32, for which the fused
    /// path does not round their input.
    fn decides(&self, _role: Self::Role) -> bool {
        false
    }

    /// Whether a tensor that no role names is harmless.
    fn ignores(&self, name: &str) -> bool;
}

impl Layout for ModelConfig {
    type Role = Role;

    fn roles(&self) -> Vec<Role> {
        Role::all(self)
    }

    fn shape(&self, role: Role) -> Vec<usize> {
        role.shape(self)
    }

    fn name(&self, role: Role, format: Format, suffix: &str) -> String {
        role.name_in(self.knobs.naming, format == Format::Gguf, suffix)
    }

    fn may_have_bias(&self, role: Role) -> bool {
        role.may_have_bias(self)
    }

    fn needs_bias(&self, role: Role) -> bool {
        role.needs_bias(self)
    }

    fn mixed(&self, role: Role, mix: Mix) -> Option<DType> {
        Some(mix.dtype(role, self))
    }

    fn decides(&self, role: Role) -> bool {
        matches!(role, Role::Router(_))
    }

    fn interleaved(&self, role: Role) -> Option<usize> {
        let rotates = matches!(role, Role::Q(_) | Role::K(_)) && self.knobs.interleaved_qk;
        rotates.then_some(self.head_dim)
    }

    fn stacked(&self, role: Role, format: Format) -> Option<Stacked> {
        let [index, count] = role.expert(self)?;
        let apart = Stacked { index, count, ..Stacked::ALONE };
        match (format, self.knobs.naming) {
            (Format::Gguf, _) => Some(apart),
            (Format::SafeTensors, Naming::Usual) => None,
            (Format::SafeTensors, Naming::GptOss) => Some(match role {
                Role::ExpertGate(..) => Stacked { every: 2, turned: true, ..apart },
                Role::ExpertUp(..) => Stacked { first: 1, every: 2, turned: true, ..apart },
                _ => Stacked { turned: true, ..apart },
            }),
        }
    }

    fn counts_from_one(&self, role: Role) -> bool {
        self.knobs.norms_from_one && role.is_norm()
    }

    /// Recomputed from the configuration, read with it, or the second copy of a tied head.
    fn ignores(&self, name: &str) -> bool {
        name.ends_with("rotary_emb.inv_freq")
            || name == "rope_freqs.weight"
            || name == "lm_head.weight"
    }
}
