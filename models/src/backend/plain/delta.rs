//! What adapters add, where gradients flow through it.

use candle_core::Tensor;

use crate::Result;
use crate::backend::DeltaInput;

/// What adapters add to one projection.
pub struct PlainDelta {
    pub(super) parts: Vec<PlainPart>,
}

pub(super) struct PlainPart {
    /// `[rank, k]`
    pub(super) a: Tensor,
    /// `[n, rank]`
    pub(super) b: Tensor,
    /// The lengths that DoRA gives to the rows, and those that they have. `[n]` each.
    pub(super) dora: Option<(Tensor, Tensor)>,
    /// What multiplies `B A`, but for the weight.
    pub(super) scale: f64,
    pub(super) weight: f64,
}

impl PlainDelta {
    /// What can learn: A, B and, of DoRA, the lengths, of one adapter after another. The lengths
    /// that rows have are constants, as in the paper of DoRA.
    pub fn tensors(&self) -> Vec<Tensor> {
        let learns = |part: &PlainPart| {
            let lengths = part.dora.as_ref().map(|(lengths, _)| lengths.clone());
            [Some(part.a.clone()), Some(part.b.clone()), lengths]
        };
        self.parts.iter().flat_map(learns).flatten().collect()
    }

    /// The update of rows whose input is `x` and whose output so far is `y`.
    pub(super) fn of(&self, x: &DeltaInput<'_, Tensor>, y: &Tensor) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for part in &self.parts {
            let h = match x {
                DeltaInput::Rows(x) => x.matmul(&part.a.t()?)?,
                DeltaInput::Ids(ids) => {
                    let ids = Tensor::new(*ids, part.a.device())?;
                    part.a.index_select(&ids, 1)?.t()?.contiguous()?
                }
            };
            let mut update = (h.matmul(&part.b.t()?)? * (part.scale * part.weight))?;
            if let Some((lengths, norm)) = &part.dora {
                let ratio = (lengths / norm)?;
                let gain = ((&ratio - 1.0)? * part.weight)?;
                update = (update.broadcast_mul(&ratio)? + y.broadcast_mul(&gain)?)?;
            }
            sum = Some(match sum {
                Some(sum) => (sum + update)?,
                None => update,
            });
        }
        match sum {
            Some(sum) => Ok(sum),
            None => Ok(y.zeros_like()?),
        }
    }
}
