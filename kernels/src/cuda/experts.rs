//! Mixture of experts on the device: `cuda/experts.cu`, `cuda/experts_linear.cu`,
//! `cuda/experts_quantized.cu`; [`crate::experts`] has the contract.
//!
//! The host knows no routing: a launch is as large as any routing of so many rows wants it, so a
//! pass that was recorded is right for whatever rows come.

use super::gpu::{Arg, Grid};
use super::linear::{Each, of_matrices};
use super::matrix::names;
use super::memory::Buffer;
use super::rows::{bf16, same_shape};
use super::{Error, Float, Gpu, Matrix, Result, Rows, Vector};
use crate::activation::Gate;
use crate::experts::Routing;

/// Experts that a row goes to at most: a lane of a warp has each.
pub const MOST_USED: usize = 32;
/// Tiles of rows that a grid counts.
const MOST_TILES: usize = 65535;

/// Gated MLPs of which each row uses a few.
pub struct ExpertWeights<'a> {
    /// `[ffn, hidden]` of each, as [`Gpu::matrices`] takes them.
    pub gate: &'a [Matrix],
    /// `[ffn, hidden]` of each.
    pub up: &'a [Matrix],
    /// `[hidden, ffn]` of each.
    pub down: &'a [Matrix],
    /// Of gate, up and down, `[experts, n]` each.
    pub biases: Option<[&'a Vector; 3]>,
    /// Which are chosen, and how they are weighed.
    pub routing: Routing,
    /// What opens the gate.
    pub activation: Gate,
}

/// Where the rows of a batch go; only the device knows.
struct Routes {
    experts: usize,
    /// Rows times the experts of each.
    pairs: usize,
    /// `[rows, used]`
    weights: Buffer,
    /// `[experts + 1]`
    starts: Buffer,
    /// `[pairs]`
    order: Buffer,
}

impl Routes {
    /// As many tiles of so many rows as any routing can want.
    fn tiles(&self, rows: usize) -> Result<usize> {
        let some = self.pairs.min(self.experts);
        let tiles = some + (self.pairs - some) / rows;
        match tiles <= MOST_TILES {
            true => Ok(tiles),
            false => Err(Error::Missing(format!("{} rows of experts in one pass", self.pairs))),
        }
    }
}

impl Gpu {
    /// The weighed sum of what the experts of each row make of it, in bf16.
    /// `scores [rows, experts]`
    pub fn experts(&self, x: &Rows, scores: &Rows, of: &ExpertWeights<'_>) -> Result<Rows> {
        let used = of.routing.used;
        let routes = self.route(x, scores, &of.routing)?;
        let bias = |part: usize| of.biases.map(|all| all[part]);
        let inner = [(of.gate, bias(0)), (of.up, bias(1))];
        let [gate, up] = self.by_expert(x, used, &routes, inner)?;
        same_shape(&gate, &up)?;
        let opened = self.gate_mul(of.activation, gate, &up)?;
        let [brought] = self.by_expert(&opened, 1, &routes, [(of.down, bias(2))])?;
        if !brought.width.is_multiple_of(8) {
            return Err(Error::Missing("experts whose outputs are eights".into()));
        }
        let out = self.rows(x.count, brought.width, Float::BF16)?;
        let eights = out.len() / 8;
        let (weights, count) = (routes.weights.at(0).into(), Arg::long(eights as u64));
        let args = [brought.at(), weights, out.at(), out.width.into(), used.into(), count];
        let grid = Grid::new(eights.div_ceil(256), 256);
        // SAFETY: a row of `brought` and a weight for each pair; eights of `out`.
        unsafe { self.launch("expert_sum", grid, &args)? };
        Ok(out)
    }

    /// Chooses for every row of `x`, and puts what was chosen in the order of experts.
    fn route(&self, x: &Rows, scores: &Rows, routing: &Routing) -> Result<Routes> {
        let Routing { count: experts, used, normalized } = *routing;
        if (scores.count, scores.width) != (x.count, experts) {
            return Err(Error::Missing("a score of each expert for every row".into()));
        }
        if !(1..=experts.min(MOST_USED)).contains(&used) {
            return Err(Error::Missing(format!(
                "{used} of {experts} experts: at most {MOST_USED}"
            )));
        }
        let (m, pairs) = (x.count, x.count * used);
        let [chosen, weights, order] = [4 * pairs; 3].map(|bytes| self.arena.take(bytes));
        let (chosen, weights, order) = (chosen?, weights?, order?);
        let starts = self.arena.take(4 * (experts + 1))?;
        let name = match scores.float {
            Float::F32 => "expert_route_f32",
            Float::BF16 => "expert_route_bf16",
        };
        let args = [
            scores.at(),
            chosen.at(0).into(),
            weights.at(0).into(),
            m.into(),
            experts.into(),
            used.into(),
            i32::from(normalized).into(),
        ];
        // SAFETY: scores and room as wide as said.
        unsafe { self.launch(name, Grid::new(m.div_ceil(8), 256), &args)? };
        let args = [
            chosen.at(0).into(),
            starts.at(0).into(),
            order.at(0).into(),
            pairs.into(),
            experts.into(),
        ];
        // SAFETY: what was chosen above.
        unsafe { self.launch("expert_order", Grid::new(experts.div_ceil(8), 256), &args)? };
        Ok(Routes { experts, pairs, weights, starts, order })
    }

    /// Products with the matrices of each row's experts, a row for each pair in bf16. The input of
    /// a pair is row `pair / each` of `x`.
    fn by_expert<const N: usize>(
        &self,
        x: &Rows,
        each: usize,
        routes: &Routes,
        weights: [(&[Matrix], Option<&Vector>); N],
    ) -> Result<[Rows; N]> {
        bf16(x)?;
        if x.product() != Float::BF16 {
            return Err(Error::Missing("experts of rows that are not widened".into()));
        }
        let mut outs = Vec::with_capacity(N);
        for (all, bias) in weights {
            let w = stacked(all, routes.experts)?;
            if bias.is_some_and(|bias| bias.len() != routes.experts * w.n) {
                return Err(Error::Missing("a bias of each expert".into()));
            }
            if w.k != x.width || !w.k.is_multiple_of(8) || x.count * each != routes.pairs {
                return Err(Error::Missing("experts as wide as their input, in eights".into()));
            }
            outs.push(self.rows(routes.pairs, w.n, Float::BF16)?);
        }
        let parts = weights.iter().zip(&outs);
        let all: Vec<Each<'_>> = parts.map(|((all, bias), out)| (&all[0], *bias, out)).collect();
        match all.iter().all(|(w, _, _)| w.dtype == all[0].0.dtype) {
            true => self.expert_products(x, each, routes, &all)?,
            false => {
                all.iter().try_for_each(|&one| self.expert_products(x, each, routes, &[one]))?
            }
        }
        Ok(outs.try_into().ok().expect("one output for each weight; this is a bug"))
    }

    /// Of weights of one format; the first matrix stands for those of all experts.
    fn expert_products(
        &self,
        x: &Rows,
        each: usize,
        routes: &Routes,
        all: &[Each<'_>],
    ) -> Result<()> {
        let n: usize = all.iter().map(|(w, _, _)| w.n).sum();
        let blocks = names(all[0].0.dtype);
        let codes = blocks.as_ref().map(|_| self.codes(x)).transpose()?;
        let mut args: Vec<Arg> = match &codes {
            Some(codes) => vec![codes.bytes.at(0).into(), codes.scales.at(0).into()],
            None => vec![x.at()],
        };
        let lists = [&routes.starts, &routes.order].map(|list| Arg::from(list.at(0)));
        args.push(x.width.into());
        args.extend(lists);
        args.extend([routes.experts, each].map(Arg::from));
        args.extend(of_matrices(x, [0, x.count], all).into_iter().skip(2));
        let (name, grid) = match &blocks {
            Some(names) => {
                let grid = (n.div_ceil(8), routes.tiles(8)?, 1);
                (names.experts, Grid::of(grid, 128, 0))
            }
            None => {
                let grid = (n.div_ceil(16), routes.tiles(16)?, 1);
                ("experts_bf16", Grid::of(grid, 256, 0))
            }
        };
        // SAFETY: the contract of the kernels: matrices of one shape that lie as they should
        // (`stacked`), a row of the outputs for each pair.
        unsafe { self.launch(name, grid, &args) }
    }
}

/// The first of matrices that lie one after the other.
fn stacked(all: &[Matrix], experts: usize) -> Result<&Matrix> {
    let first = all.first().filter(|_| all.len() == experts);
    let first = first.ok_or_else(|| Error::Missing("a matrix for each expert".into()))?;
    let follows = |(i, w): (usize, &Matrix)| {
        let place = first.buffer.at(i * first.stride());
        (w.dtype, w.n, w.k) == (first.dtype, first.n, first.k) && w.buffer.at(0) == place
    };
    match all.iter().enumerate().all(follows) {
        true => Ok(first),
        false => Err(Error::Missing("experts of one shape and format, taken together".into())),
    }
}
