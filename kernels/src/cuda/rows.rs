//! Activations on the device, and the small operations on them (`cuda/elementwise.cu`).

use cudarc::driver::result;

use super::gpu::{Arg, Grid};
use super::memory::Buffer;
use super::{Error, Gpu, Result, Vector};
use crate::activation::Gate;

/// Element type of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// The residual stream, and logits.
    F32,
    /// Everything between.
    BF16,
}

impl Float {
    /// Of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 => 2,
        }
    }
}

/// Activations, `[count, width]`.
pub struct Rows {
    pub(super) buffer: Buffer,
    pub(super) count: usize,
    pub(super) width: usize,
    pub(super) float: Float,
    /// Products with them are f32 whatever they are.
    pub(super) wide: bool,
}

impl Rows {
    /// The same, products with which are f32.
    pub fn widened(self) -> Self {
        Self { wide: true, ..self }
    }

    /// The type of products with them.
    pub(super) fn product(&self) -> Float {
        if self.wide { Float::F32 } else { self.float }
    }

    /// Rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Element type.
    pub fn float(&self) -> Float {
        self.float
    }

    #[cfg(feature = "nccl")]
    pub(super) fn place(&self) -> cudarc::driver::sys::CUdeviceptr {
        self.buffer.at(0)
    }

    pub(super) fn at(&self) -> Arg {
        self.buffer.at(0).into()
    }

    /// The first of them.
    pub fn first(self, count: usize) -> Self {
        assert!(count <= self.count, "rows that are there");
        Self { count, ..self }
    }

    /// The same memory under another name: for whoever reads rows that somebody else keeps.
    pub fn alias(&self) -> Self {
        Self { buffer: self.buffer.alias(), ..*self }
    }

    pub(super) fn len(&self) -> usize {
        self.count * self.width
    }
}

/// Threads of a block where nothing speaks for another number.
const THREADS: u32 = 256;

fn blocks(elements: usize) -> usize {
    elements.div_ceil(THREADS as usize)
}

impl Gpu {
    /// Rows with whatever was in memory before: the caller writes every element.
    pub(super) fn rows(&self, count: usize, width: usize, float: Float) -> Result<Rows> {
        let buffer = self.arena.take(count * width * float.bytes())?;
        Ok(Rows { buffer, count, width, float, wide: false })
    }

    /// Rows from the host.
    pub fn rows_from(&self, values: &[f32], count: usize, float: Float) -> Result<Rows> {
        let width = values.len() / count.max(1);
        assert_eq!(count * width, values.len(), "rows are of one width");
        let buffer = self.send(values)?;
        let rows = Rows { buffer, count, width, float: Float::F32, wide: false };
        self.convert(rows, float)
    }

    /// The same numbers in another type.
    pub fn convert(&self, x: Rows, float: Float) -> Result<Rows> {
        let name = match (x.float, float) {
            (Float::F32, Float::BF16) => "f32_to_bf16",
            (Float::BF16, Float::F32) => "bf16_to_f32",
            _ => return Ok(x),
        };
        let out = self.rows(x.count, x.width, float)?;
        let args = [x.at(), out.at(), Arg::long(x.len() as u64)];
        // SAFETY: both hold `len` elements of the types that the name says.
        unsafe { self.launch(name, Grid::new(blocks(x.len().div_ceil(8)), THREADS), &args)? };
        Ok(out)
    }

    /// The numbers themselves. `[count * width]`
    pub fn read(&self, x: Rows) -> Result<Vec<f32>> {
        self.fetch_rows(x)?.open()
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over groups of `weight.len()` elements, in bf16.
    pub fn rms_norm(&self, x: &Rows, weight: &Vector, eps: f32) -> Result<Rows> {
        let dim = weight.len();
        let groups = whole(x.len(), dim)?;
        let out = self.rows(x.count, x.width, Float::BF16)?;
        let name = match x.float {
            Float::F32 => "rms_norm_f32",
            Float::BF16 => "rms_norm_bf16",
        };
        let args = [x.at(), weight.at(), out.at(), eps.into(), dim.into(), groups.into()];
        // SAFETY: `groups * dim` elements on both sides, `dim` of the weight.
        unsafe { self.launch(name, norm_grid(groups, dim), &args)? };
        Ok(out)
    }

    /// `x += y`, and the [`Gpu::rms_norm`] of the sum: both.
    pub fn add_rms_norm(
        &self,
        x: Rows,
        y: &Rows,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Rows, Rows)> {
        if x.float != Float::F32 || y.float != Float::BF16 || weight.len() != x.width {
            let x = self.add(x, y)?;
            let normed = self.rms_norm(&x, weight, eps)?;
            return Ok((x, normed));
        }
        same_shape(&x, y)?;
        let out = self.rows(x.count, x.width, Float::BF16)?;
        let args =
            [x.at(), y.at(), weight.at(), out.at(), eps.into(), x.width.into(), x.count.into()];
        // SAFETY: three matrices of one shape, a weight as wide.
        unsafe { self.launch("add_rms_norm", Grid::new(x.count, 256), &args)? };
        Ok((x, out))
    }

    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over whole rows, in bf16.
    pub fn layer_norm(&self, x: &Rows, weight: &Vector, bias: &Vector, eps: f32) -> Result<Rows> {
        if weight.len() != x.width || bias.len() != x.width {
            return Err(Error::Missing("a layer norm as wide as its rows".into()));
        }
        let out = self.rows(x.count, x.width, Float::BF16)?;
        let name = match x.float {
            Float::F32 => "layer_norm_f32",
            Float::BF16 => "layer_norm_bf16",
        };
        let args =
            [x.at(), weight.at(), bias.at(), out.at(), eps.into(), x.width.into(), x.count.into()];
        // SAFETY: shapes as checked above.
        unsafe { self.launch(name, Grid::new(x.count, 256), &args)? };
        Ok(out)
    }

    /// `x + y`, in the type of `x`.
    pub fn add(&self, x: Rows, y: &Rows) -> Result<Rows> {
        same_shape(&x, y)?;
        let name = match (x.float, y.float) {
            (Float::F32, Float::BF16) => "add_f32",
            (Float::BF16, Float::BF16) => "add_bf16",
            (Float::F32, Float::F32) => "add_f32_f32",
            (Float::BF16, Float::F32) => return Err(Error::Missing("bf16 += f32".into())),
        };
        let args = [x.at(), y.at(), Arg::long(x.len() as u64)];
        // SAFETY: as many elements on both sides.
        unsafe { self.launch(name, Grid::new(blocks(x.len().div_ceil(8)), THREADS), &args)? };
        Ok(x)
    }

    /// `x + bias` for every row.
    pub fn add_bias(&self, x: Rows, bias: &Vector) -> Result<Rows> {
        if bias.len() != x.width {
            return Err(Error::Missing("a bias as wide as its rows".into()));
        }
        let name = match x.float {
            Float::F32 => "add_bias_f32",
            Float::BF16 => "add_bias_bf16",
        };
        let args = [x.at(), bias.at(), x.width.into(), Arg::long(x.len() as u64)];
        // SAFETY: rows as wide as the bias.
        unsafe { self.launch(name, Grid::new(blocks(x.len().div_ceil(8)), THREADS), &args)? };
        Ok(x)
    }

    /// `activation(gate) * up`, in bf16.
    pub fn gate_mul(&self, kind: Gate, gate: Rows, up: &Rows) -> Result<Rows> {
        same_shape(&gate, up)?;
        bf16(&gate)?;
        bf16(up)?;
        let name = match kind {
            Gate::Silu => "silu_mul",
            Gate::GeluTanh => "gelu_tanh_mul",
            Gate::ClampedSwiglu => "clamped_swiglu_mul",
        };
        // Every element is read before it is written, by the same thread.
        let args = [gate.at(), up.at(), gate.at(), Arg::long(gate.len() as u64)];
        let grid = Grid::new(blocks(gate.len().div_ceil(8)), THREADS);
        // SAFETY: three matrices of one shape.
        unsafe { self.launch(name, grid, &args)? };
        Ok(gate)
    }

    /// `x * factor`, of the residual stream.
    pub fn scale(&self, x: Rows, factor: f32) -> Result<Rows> {
        self.change("scale", x, factor)
    }

    /// `cap * tanh(x / cap)`, of logits.
    pub fn softcap(&self, x: Rows, cap: f32) -> Result<Rows> {
        self.change("softcap", x, cap)
    }

    fn change(&self, name: &'static str, x: Rows, number: f32) -> Result<Rows> {
        if x.float != Float::F32 {
            return Err(Error::Missing(format!("{name} of rows in f32")));
        }
        let args = [x.at(), number.into(), Arg::long(x.len() as u64)];
        // SAFETY: in place, each element by one thread.
        unsafe { self.launch(name, Grid::new(blocks(x.len().div_ceil(8)), THREADS), &args)? };
        Ok(x)
    }

    /// `x * Phi(x)`, exactly (`erf`) or by its approximation with a tangent.
    pub fn gelu(&self, x: Rows, erf: bool) -> Result<Rows> {
        bf16(&x)?;
        let name = if erf { "gelu_erf" } else { "gelu_tanh" };
        let args = [x.at(), x.at(), Arg::long(x.len() as u64)];
        // SAFETY: in place, each element by one thread.
        unsafe { self.launch(name, Grid::new(blocks(x.len().div_ceil(8)), THREADS), &args)? };
        Ok(x)
    }

    /// Some rows of `x`, whose numbers lie on the device.
    pub(super) fn select_at(&self, x: &Rows, rows: Arg, count: usize) -> Result<Rows> {
        let out = self.rows(count, x.width, x.float)?;
        let name = match x.float {
            Float::F32 => "select_rows_f32",
            Float::BF16 => "select_rows_bf16",
        };
        let args = [x.at(), rows, out.at(), x.width.into(), count.into()];
        // SAFETY: the callers have checked the numbers against `x`.
        unsafe { self.launch(name, Grid::new(count, 128), &args)? };
        Ok(out)
    }

    /// A copy of one row of `x`, for longer than its pass.
    pub fn keep(&self, x: &Rows, row: usize) -> Result<Rows> {
        assert!(row < x.count, "a row that does not exist");
        let bytes = x.width * x.float.bytes();
        let buffer = self.kept.take(bytes)?;
        self.context.bind_to_thread()?;
        let (to, from, stream) = (buffer.at(0), x.buffer.at(row * bytes), self.stream.cu_stream());
        // SAFETY: both hold so many bytes, in different buffers.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream)? };
        Ok(Rows { buffer, count: 1, ..*x })
    }

    /// Some rows of `x`, in the order given.
    pub fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows> {
        assert!(rows.iter().all(|&row| (row as usize) < x.count), "a row that does not exist");
        let list = self.send(rows)?;
        self.select_at(x, list.at(0).into(), rows.len())
    }
}

/// One block for a wide group, one warp for a narrow one.
fn norm_grid(groups: usize, dim: usize) -> Grid {
    match dim > 256 {
        true => Grid::new(groups, 256),
        false => Grid::new(groups.div_ceil(8), 256),
    }
}

fn whole(len: usize, dim: usize) -> Result<usize> {
    match dim > 0 && len.is_multiple_of(dim) {
        true => Ok(len / dim),
        false => Err(Error::Missing(format!("rows in groups of {dim}"))),
    }
}

pub(super) fn same_shape(x: &Rows, y: &Rows) -> Result<()> {
    match (x.count, x.width) == (y.count, y.width) {
        true => Ok(()),
        false => Err(Error::Missing(format!(
            "rows of one shape: [{}, {}] and [{}, {}]",
            x.count, x.width, y.count, y.width
        ))),
    }
}

pub(super) fn bf16(x: &Rows) -> Result<()> {
    match x.float {
        Float::BF16 => Ok(()),
        Float::F32 => Err(Error::Missing("rows in bf16".into())),
    }
}
