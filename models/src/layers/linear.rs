//! `y = x W^T (+ b) (+ what adapters add to some rows)`: one type for every weight format, and the
//! one place for LoRA.
//!
//! Hu et al. 2021. Rows of one batch run with different adapters, or none: a [`Linear`] holds what
//! each list of adapters adds to it, and [`LoraRows`] says which rows run with which. The product
//! comes first, then the adapters, then the bias, which DoRA does not stretch.

use std::collections::BTreeMap;

use crate::Result;
use crate::backend::{Backend, DeltaGroup, DeltaInput};
use crate::batch::{LoraRows, LoraSlot};
use crate::weights::{Layout, Loader};

/// A projection from `k` to `n` elements.
pub struct Linear<B: Backend> {
    /// `[n, k]`
    pub weight: B::Matrix,
    /// `[n]`
    pub bias: Option<B::Vector>,
    /// What adapters add.
    pub deltas: Deltas<B>,
}

impl<B: Backend> Linear<B> {
    /// Takes the weight, and the bias where the file has one.
    pub fn load<L: Layout>(loader: &mut Loader<'_, L>, ops: &B, role: L::Role) -> Result<Self> {
        let weight = loader.matrix(role, |source| ops.matrix(source))?;
        let bias = loader.bias(role)?.map(|values| ops.vector(values)).transpose()?;
        Ok(Self { weight, bias, deltas: Deltas::default() })
    }

    /// One projection.
    pub fn forward(&self, ops: &B, x: &B::Rows, lora: &LoraRows) -> Result<B::Rows> {
        let [y] = Self::forward_many(ops, x, [self], lora)?;
        Ok(y)
    }

    /// Several projections of the same input: the input is prepared once.
    pub fn forward_many<const N: usize>(
        ops: &B,
        x: &B::Rows,
        linears: [&Self; N],
        lora: &LoraRows,
    ) -> Result<[B::Rows; N]> {
        project(ops, x, linears.map(|l| (&l.weight, l.bias.as_ref(), &l.deltas)), lora)
    }
}

/// Weight and bias of a projection, and what adapters add.
pub type Projection<'a, B> =
    (&'a <B as Backend>::Matrix, Option<&'a <B as Backend>::Vector>, &'a Deltas<B>);

/// [`Linear::forward_many`] with the parts of each.
pub fn project<B: Backend, const N: usize>(
    ops: &B,
    x: &B::Rows,
    parts: [Projection<'_, B>; N],
    lora: &LoraRows,
) -> Result<[B::Rows; N]> {
    let groups = parts.map(|(_, _, deltas)| deltas.groups(lora));
    if groups.iter().all(Vec::is_empty) {
        return ops.linear(x, parts.map(|(weight, bias, _)| (weight, bias)));
    }
    let products = ops.linear(x, parts.map(|(weight, _, _)| (weight, None)))?;
    let updated = ops.add_deltas(DeltaInput::Rows(x), products, groups)?;
    let mut out = Vec::with_capacity(N);
    for (y, (_, bias, _)) in updated.into_iter().zip(parts) {
        out.push(match bias {
            Some(bias) => ops.add_bias(y, bias)?,
            None => y,
        });
    }
    Ok(out.try_into().ok().expect("one output for each part; this is a bug"))
}

/// Rows of a table by the tokens of a batch, and what adapters add to them.
pub fn embed<B: Backend>(
    ops: &B,
    (table, deltas): (&B::Matrix, &Deltas<B>),
    (step, ids): (&B::Step, &[u32]),
    lora: &LoraRows,
) -> Result<B::Rows> {
    let (rows, groups) = (ops.embed_tokens(table, step)?, deltas.groups(lora));
    if groups.is_empty() {
        return Ok(rows);
    }
    let [rows] = ops.add_deltas(DeltaInput::Ids(ids), [rows], [groups])?;
    Ok(rows)
}

/// What each list of adapters adds to one projection.
pub struct Deltas<B: Backend>(BTreeMap<LoraSlot, B::Delta>);

impl<B: Backend> Default for Deltas<B> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<B: Backend> Deltas<B> {
    /// Takes those of one more list.
    pub fn put(&mut self, slot: LoraSlot, delta: B::Delta) {
        self.0.insert(slot, delta);
    }

    /// Those of a list, where it adds something here.
    pub fn get(&self, slot: LoraSlot) -> Option<&B::Delta> {
        self.0.get(&slot)
    }

    /// Lets those of a list go.
    pub fn drop(&mut self, slot: LoraSlot) {
        self.0.remove(&slot);
    }

    /// Rows to which something is added, and what.
    fn groups<'a>(&'a self, lora: &'a LoraRows) -> Vec<DeltaGroup<'a, B::Delta>> {
        if self.0.is_empty() {
            return Vec::new();
        }
        lora.groups().filter_map(|(slot, rows)| Some((rows, self.0.get(&slot)?))).collect()
    }
}
