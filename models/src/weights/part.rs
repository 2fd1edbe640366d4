//! What one rank of several has of a model (Shoeybi et al. 2019, tensor parallelism).
//!
//! A rank is a smaller model: fewer heads, a narrower MLP. Its configuration says so, and what it
//! takes of a tensor follows from the two shapes alone: where it has fewer outputs, rows; where it
//! has fewer inputs, columns, and then the outputs of all ranks are added up; else all of it.

use super::{DType, Layout};

/// A rank, and its model.
#[derive(Clone, Debug)]
pub struct Part<L> {
    /// The model that this rank is.
    pub config: L,
    /// Which rank, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
}

impl<L: Layout> Part<L> {
    /// The first row, the first column, and the shape of what this rank has of a matrix `[n, k]`
    /// (or of its bias, `k` being 1).
    pub(super) fn of(&self, role: L::Role, [n, k]: [usize; 2]) -> (usize, usize, [usize; 2]) {
        let own = self.config.shape(role);
        let (own_n, own_k) = (own[0], own.get(1).map_or(k, |&own| own.min(k)));
        let start = |own: usize, all: usize| if own < all { self.rank * own } else { 0 };
        (start(own_n, n), start(own_k, k), [own_n, own_k])
    }

    /// Whether ranks have columns, and so sums that are not complete.
    pub(super) fn adds_up(&self, role: L::Role, whole: &L) -> bool {
        self.config.shape(role).get(1) < whole.shape(role).get(1)
    }

    /// Refuses columns that are no whole blocks of a type.
    pub(super) fn check(
        &self,
        role: L::Role,
        shape: &[usize],
        types: &[DType],
    ) -> Result<(), String> {
        let &[n, k] = shape else { return Ok(()) };
        let (_, _, [_, own]) = self.of(role, [n, k]);
        match types.iter().find(|dtype| own < k && dtype.row_bytes(own).is_none()) {
            None => Ok(()),
            Some(dtype) => Err(format!(
                "is {dtype}, in blocks of {}: {k} columns cannot be divided among {} devices",
                dtype.block_len(),
                self.size
            )),
        }
    }
}
