//! `y = x W^T (+ b)`: one type for every weight format.

use crate::Result;
use crate::backend::Backend;
use crate::weights::{Layout, Loader};

/// A projection from `k` to `n` elements.
pub struct Linear<B: Backend> {
    /// `[n, k]`
    pub weight: B::Matrix,
    /// `[n]`
    pub bias: Option<B::Vector>,
}

impl<B: Backend> Linear<B> {
    /// Takes the weight, and the bias where the file has one.
    pub fn load<L: Layout>(loader: &mut Loader<'_, L>, ops: &B, role: L::Role) -> Result<Self> {
        let weight = loader.matrix(role, |source| ops.matrix(source))?;
        let bias = loader.bias(role)?.map(|values| ops.vector(values)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// One projection.
    pub fn forward(&self, ops: &B, x: &B::Rows) -> Result<B::Rows> {
        let [y] = ops.linear(x, [self.parts()])?;
        Ok(y)
    }

    /// Several projections of the same input: the input is prepared once.
    pub fn forward_many<const N: usize>(
        ops: &B,
        x: &B::Rows,
        linears: [&Self; N],
    ) -> Result<[B::Rows; N]> {
        ops.linear(x, linears.map(Self::parts))
    }

    fn parts(&self) -> (&B::Matrix, Option<&B::Vector>) {
        (&self.weight, self.bias.as_ref())
    }
}
