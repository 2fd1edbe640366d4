//! From a role in the architecture to numbers: checks, row order, page release.
//!
//! Every tensor is read once, in the order the model asks, and its pages are let go as soon as
//! the backend has taken them (row by row where it packs), so that resident memory never exceeds
//! one copy of the weights by more than what is being packed. A rank of several takes its [`Part`]
//! of every tensor: rows, or columns in whole blocks, and no float of the others is made.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use hearth_kernels::matmul::Rows;
use hearth_kernels::quant::{self, DType};

use super::{Layout, MappedFile, Mix, Part, TensorView, Weights};
use crate::config::ModelConfig;
use crate::{Error, Result};

/// A matrix on its way from a file to a backend. `W [n, k]`, `y = x W^T`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// Element or block type of the rows that it hands out.
    pub dtype: DType,
    /// That of the file; differs only where floats are quantised on the way.
    stored: DType,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Rows as the file has them.
    bytes: &'a [u8],
    /// Bytes of one of them.
    stride: usize,
    /// The row of the file that is row 0 here.
    first: usize,
    /// Where in a row its bytes begin here, and how many there are.
    columns: [usize; 2],
    /// Head width, when the file has the rows of each head in the order of adjacent pairs.
    interleaved: Option<usize>,
    /// The file that `bytes` are of, where its pages may be let go row by row.
    file: Option<&'a MappedFile>,
}

impl<'a> MatrixSource<'a> {
    /// Output `row` as the file has it.
    fn stored_row(&self, row: usize) -> &'a [u8] {
        let [start, len] = self.columns;
        let start = self.place(row) * self.stride + start;
        &self.bytes[start..start + len]
    }

    /// Where the file has output `row`.
    fn place(&self, row: usize) -> usize {
        self.first + self.interleaved.map_or(row, |head_dim| adjacent(row, head_dim))
    }

    /// All rows as floats, in order. `[n * k]`
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for (row, out) in out.chunks_exact_mut(self.k).enumerate() {
            quant::dequantize(self.dtype, &self.row(row), out);
        }
        out
    }
}

/// Where GGUF files of the Llama type have row `row` of Q or K: row `s * half + j` of a head stands
/// at `2 j + s`.
pub(crate) fn adjacent(row: usize, head_dim: usize) -> usize {
    let (head, r) = (row / head_dim, row % head_dim);
    let (s, j) = (r / (head_dim / 2), r % (head_dim / 2));
    head * head_dim + 2 * j + s
}

impl Rows for MatrixSource<'_> {
    fn row(&self, row: usize) -> Cow<'_, [u8]> {
        let bytes = self.stored_row(row);
        if self.dtype == self.stored {
            return Cow::Borrowed(bytes);
        }
        let mut values = vec![0.0; self.k];
        quant::dequantize(self.stored, bytes, &mut values);
        let made = quant::quantize(self.dtype, &values);
        Cow::Owned(made.expect("a mix has only types with a quantiser; this is a bug"))
    }

    /// Lets the pages of the rows go (and, where heads are interleaved, of their whole heads).
    fn packed(&self, rows: Range<usize>) {
        let head = self.interleaved.unwrap_or(1);
        let rows = rows.start / head * head..rows.end.next_multiple_of(head).min(self.n);
        let bytes = [rows.start, rows.end].map(|row| (self.first + row) * self.stride);
        if let Some(file) = self.file {
            file.release_slice(&self.bytes[bytes[0]..bytes[1]]);
        }
    }
}

/// Hands out the tensors of one model.
pub struct Loader<'a, L: Layout = ModelConfig> {
    weights: &'a Weights,
    config: &'a L,
    mix: Option<Mix>,
    part: Option<&'a Part<L>>,
    /// Roles still to come, if they are asked for in their order.
    order: std::vec::IntoIter<L::Role>,
    progress: &'a mut dyn FnMut(usize),
}

impl<'a, L: Layout> Loader<'a, L> {
    /// `progress` is told the bytes of every tensor as it is taken.
    pub fn new(weights: &'a Weights, config: &'a L, progress: &'a mut dyn FnMut(usize)) -> Self {
        let order = config.roles().into_iter();
        Self { weights, config, mix: None, part: None, order, progress }
    }

    /// Matrices of floats are quantised on the way; others are refused by [`Loader::check`].
    pub fn with_mix(self, mix: Option<Mix>) -> Self {
        Self { mix, ..self }
    }

    /// The same from the beginning, for one rank: what it has of every tensor.
    pub fn part<'b>(&'b mut self, part: &'b Part<L>) -> Loader<'b, L> {
        let Self { weights, config, mix, .. } = *self;
        let order = config.roles().into_iter();
        Loader { weights, config, mix, part: Some(part), order, progress: &mut *self.progress }
    }

    /// Holds names, types and shapes of all tensors against the configuration, and reads none: a
    /// tensor that is missing, strange or of no use is refused before the first is packed.
    pub fn check(&self) -> Result<()> {
        let mut used = HashSet::new();
        for role in self.config.roles() {
            let (name, shape) = (self.name(role, "weight"), self.config.shape(role));
            let dtype = match self.stacked(role) {
                None => self.check_tensor(&name, &shape)?,
                Some([_, count]) => self.check_tensor(&name, &[&[count], &shape[..]].concat())?,
            };
            if self.mix.is_some() && dtype.block_len() > 1 {
                let what = format!("is {dtype} already: only floats are quantised while loading");
                return Err(Error::Tensor { name, what });
            }
            if let Some(part) = self.part {
                let made = self.mix.and_then(|mix| self.config.mixed(role, mix));
                part.check(role, &shape, &[Some(dtype), made])
                    .map_err(|what| Error::Tensor { name: name.clone(), what })?;
            }
            used.insert(name);
            let bias = self.name(role, "bias");
            let may = self.config.may_have_bias(role) && self.weights.has(&bias);
            if may || self.config.needs_bias(role) {
                if self.check_tensor(&bias, &shape[..1])?.block_len() > 1 {
                    let what = "a bias cannot be quantised".into();
                    return Err(Error::Tensor { name: bias, what });
                }
                used.insert(bias);
            }
        }
        let stray = |name: &&str| !used.contains(*name) && !self.config.ignores(name);
        let strays: Vec<&str> = self.weights.names().filter(stray).collect();
        match strays.first() {
            None => Ok(()),
            Some(first) => Err(Error::Tensor {
                name: (*first).to_owned(),
                what: format!(
                    "has no place in this architecture ({} such tensors); \
                     the model would not be what it claims",
                    strays.len()
                ),
            }),
        }
    }

    fn check_tensor(&self, name: &str, shape: &[usize]) -> Result<DType> {
        let dtype = self.weights.readable(name)?;
        let found = self.weights.info(name).map(|info| info.shape.as_slice());
        if found != Some(shape) {
            let found = found.unwrap_or_default();
            let what = format!("has shape {found:?}, the configuration says {shape:?}");
            return Err(Error::Tensor { name: name.to_owned(), what });
        }
        Ok(dtype)
    }

    /// Gives the matrix to `take` and then lets its pages go.
    pub fn matrix<T>(
        &mut self,
        role: L::Role,
        take: impl FnOnce(&MatrixSource<'_>) -> Result<T>,
    ) -> Result<T> {
        let name = self.name(role, "weight");
        self.read_ahead(role, 1);
        let taken = take(&self.source(role, &name)?)?;
        self.weights.release(&name);
        Ok(taken)
    }

    /// The same for several matrices of one shape and type: those of all experts.
    pub fn matrices<T>(
        &mut self,
        roles: &[L::Role],
        take: impl FnOnce(&[MatrixSource<'_>]) -> Result<T>,
    ) -> Result<T> {
        let names: Vec<String> = roles.iter().map(|&role| self.name(role, "weight")).collect();
        roles.last().into_iter().for_each(|&role| self.read_ahead(role, roles.len()));
        let mut sources = Vec::with_capacity(roles.len());
        for (&role, name) in roles.iter().zip(&names) {
            let source = self.source(role, name)?;
            let first: MatrixSource<'_> = sources.first().copied().unwrap_or(source);
            if source.dtype != first.dtype {
                let what = format!("is {}, that of the first expert {}", source.dtype, first.dtype);
                return Err(Error::Tensor { name: name.clone(), what });
            }
            sources.push(source);
        }
        let taken = take(&sources)?;
        names.iter().for_each(|name| self.weights.release(name));
        Ok(taken)
    }

    /// What a matrix is made of.
    fn source<'n>(&mut self, role: L::Role, name: &'n str) -> Result<MatrixSource<'n>>
    where
        'a: 'n,
    {
        let stacked = self.stacked(role);
        let [index, count] = stacked.unwrap_or([0, 1]);
        let view = self.view(name, [index, count])?;
        let (n, k) = match (view.shape, stacked) {
            (&[n, k], None) | (&[_, n, k], Some(_)) => (n, k),
            _ => {
                let (name, what) = (name.to_owned(), "is not a matrix".into());
                return Err(Error::Tensor { name, what });
            }
        };
        let stride = view.bytes.len() / (count * n).max(1);
        let (first, columns, [own_n, own_k]) = match self.part {
            None => (0, [0, stride], [n, k]),
            Some(part) => {
                let whole = "columns of whole blocks, as checked; this is a bug";
                let (first, start, own) = part.of(role, [n, k]);
                (first, [start, own[1]].map(|k| view.dtype.row_bytes(k).expect(whole)), own)
            }
        };
        let mixed = self.mix.and_then(|mix| self.config.mixed(role, mix));
        Ok(MatrixSource {
            dtype: mixed.unwrap_or(view.dtype),
            stored: view.dtype,
            n: own_n,
            k: own_k,
            bytes: view.bytes,
            stride,
            first: index * n + first,
            columns,
            interleaved: self.config.interleaved(role),
            file: self.weights.file_of(name),
        })
    }

    fn stacked(&self, role: L::Role) -> Option<[usize; 2]> {
        self.config.stacked(role, self.weights.format())
    }

    /// A norm.
    pub fn vector(&mut self, role: L::Role) -> Result<Vec<f32>> {
        let name = self.name(role, "weight");
        self.read_ahead(role, 1);
        let view = self.view(&name, [0, 1])?;
        let mut out = vec![0.0; view.shape.iter().product()];
        quant::dequantize(view.dtype, view.bytes, &mut out);
        if self.config.counts_from_one(role) {
            out.iter_mut().for_each(|x| *x += 1.0);
        }
        self.weights.release(&name);
        Ok(out)
    }

    /// The bias of a projection, where the file has one. Where the outputs of ranks are added up,
    /// the first rank has it.
    pub fn bias(&mut self, role: L::Role) -> Result<Option<Vec<f32>>> {
        let name = self.name(role, "bias");
        if !self.weights.has(&name) {
            return Ok(None);
        }
        let view = self.view(&name, [0, 1])?;
        let (dtype, bytes) = (view.dtype, view.bytes);
        let stride = bytes.len() / view.shape[0].max(1);
        let (first, n) = match self.part {
            None => (0, view.shape[0]),
            Some(part) if part.adds_up(role, self.config) && part.rank > 0 => return Ok(None),
            Some(part) => {
                let (first, _, [n, _]) = part.of(role, [view.shape[0], 1]);
                (first, n)
            }
        };
        let values = MatrixSource {
            dtype,
            stored: dtype,
            n,
            k: 1,
            bytes,
            stride,
            first,
            columns: [0, stride],
            interleaved: self.config.interleaved(role),
            file: None,
        }
        .to_f32();
        self.weights.release(&name);
        Ok(Some(values))
    }

    fn name(&self, role: L::Role, suffix: &str) -> String {
        self.config.name(role, self.weights.format(), suffix)
    }

    /// Lets the disk work on the next tensors while this one is packed.
    fn read_ahead(&mut self, role: L::Role, count: usize) {
        self.order.by_ref().find(|next| *next == role);
        let mut asked = None;
        for &next in self.order.as_slice().iter().take(count) {
            let name = Some(self.name(next, "weight"));
            if name != asked {
                name.iter().for_each(|name| self.weights.will_need(name));
            }
            asked = name;
        }
    }

    /// A tensor, or the part of it with this number of so many.
    fn view<'n>(&mut self, name: &'n str, [index, count]: [usize; 2]) -> Result<TensorView<'n>>
    where
        'a: 'n,
    {
        let view = self.weights.tensor(name)?;
        // Each part, and each rank, tells its share, so that all of them tell the whole.
        let (rank, ranks) = self.part.map_or((0, 1), |part| (part.rank, part.size));
        let told = |parts: usize| {
            let parts = (index * ranks + rank + parts) as u128;
            (view.bytes.len() as u128 * parts / (count * ranks) as u128) as usize
        };
        (self.progress)(told(1) - told(0));
        Ok(view)
    }
}
