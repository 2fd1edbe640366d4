//! Adapters merged into the weights of their base, row by row.

use std::sync::Arc;

use super::{Adapter, Delta};
use crate::weights::Role;

/// What is added to one matrix of a model.
pub struct Merge {
    parts: Vec<Part>,
    /// Outputs are columns, as of an embedding.
    by_column: bool,
    /// What multiplies the base's own output, less 1. `[n]`, where DoRA changes lengths.
    gain: Option<Vec<f32>>,
}

/// One adapter. `rows x columns` is the shape of the matrix.
struct Part {
    rank: usize,
    weight: f32,
    /// `[rows, rank]`
    left: Vec<f32>,
    /// `[rank, columns]`
    right: Vec<f32>,
    /// What multiplies each output of the update. `[n]`
    ratio: Option<Vec<f32>>,
}

impl Merge {
    /// Of adapters, each with its weight; `None` where they change nothing.
    pub fn new(role: Role, adapters: &[(Arc<Adapter>, f32)]) -> Option<Self> {
        let by_column = super::is_table(role);
        let mut gain: Option<Vec<f32>> = None;
        let mut parts = Vec::new();
        for (adapter, weight) in adapters.iter().filter(|(_, weight)| *weight != 0.0) {
            let Some(delta) = adapter.get(role) else { continue };
            let ratio = ratio(delta);
            if let Some(ratio) = &ratio {
                let gain = gain.get_or_insert_with(|| vec![0.0; ratio.len()]);
                gain.iter_mut().zip(ratio).for_each(|(g, ratio)| *g += weight * (ratio - 1.0));
            }
            let f = &delta.factors;
            let (left, right) = match by_column {
                true => (turned(&f.to_a(), f.k()), turned(&f.to_b(), f.rank())),
                false => (f.to_b(), f.to_a()),
            };
            parts.push(Part { rank: f.rank(), weight: weight * delta.scale, left, right, ratio });
        }
        (!parts.is_empty()).then_some(Self { parts, by_column, gain })
    }

    /// Adds to row `row` of the matrix, in this house's order of rows.
    pub fn add_to(&self, row: usize, values: &mut [f32]) {
        let own =
            |factors: &[f32], column: usize| factors[if self.by_column { column } else { row }];
        if let Some(gain) = &self.gain {
            for (column, value) in values.iter_mut().enumerate() {
                *value += own(gain, column) * *value;
            }
        }
        for part in &self.parts {
            let mut update = vec![0.0; values.len()];
            let left = &part.left[row * part.rank..(row + 1) * part.rank];
            for (left, right) in left.iter().zip(part.right.chunks_exact(values.len())) {
                update.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
            }
            for (column, (value, update)) in values.iter_mut().zip(update).enumerate() {
                let ratio = part.ratio.as_ref().map_or(1.0, |ratio| own(ratio, column));
                *value += part.weight * ratio * update;
            }
        }
    }
}

/// The transpose of a matrix whose rows have `columns` numbers.
fn turned(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.len() / columns;
    (0..matrix.len()).map(|i| matrix[i % rows * columns + i / rows]).collect()
}

fn ratio(delta: &Delta) -> Option<Vec<f32>> {
    let dora = delta.dora.as_ref()?;
    Some(dora.magnitude.iter().zip(&dora.norm).map(|(wanted, is)| wanted / is).collect())
}
