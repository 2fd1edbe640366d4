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

use super::{Layout, MappedFile, Mix, Part, Stacked, Weights, mxfp4};
use crate::config::ModelConfig;
use crate::{Error, Result};

/// A matrix on its way from a file to a backend. `W [n, k]`, `y = x W^T`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// Element or block type of the rows that it hands out.
    pub dtype: DType,
    /// That of the file; differs where floats are quantised on the way, and where products decide.
    stored: DType,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The matrix as the file has it.
    bytes: &'a [u8],
    /// How it lies there.
    form: Form<'a>,
    /// The row of the file that is row 0 here, and from one row to the next.
    rows: [usize; 2],
    /// The column of the file that is column 0 here.
    column: usize,
    /// Head width, when the file has the rows of each head in the order of adjacent pairs.
    interleaved: Option<usize>,
    /// The file that `bytes` are of, where its pages may be let go row by row.
    file: Option<&'a MappedFile>,
}

/// How a matrix lies in its file.
#[derive(Clone, Copy, Debug)]
enum Form<'a> {
    /// Row by row, so many bytes each.
    Rows(usize),
    /// Column by column, so many elements each.
    Columns(usize),
    /// Codes of MXFP4 row by row, so many blocks each; their scales apart.
    Codes(usize, &'a [u8]),
}

impl<'a> MatrixSource<'a> {
    /// Output `row` in the type of the file.
    fn stored_row(&self, row: usize) -> Cow<'a, [u8]> {
        let place = self.place(row);
        let whole = "columns of whole blocks, as checked; this is a bug";
        let [start, len] = [self.column, self.k].map(|k| self.stored.row_bytes(k).expect(whole));
        match self.form {
            Form::Rows(stride) => Cow::Borrowed(&self.bytes[place * stride + start..][..len]),
            Form::Columns(column_len) => {
                let size = len / self.k;
                let columns = self.column..self.column + self.k;
                let element = |column| &self.bytes[(column * column_len + place) * size..][..size];
                Cow::Owned(columns.flat_map(element).copied().collect())
            }
            Form::Codes(stride, scales) => {
                let (first, blocks) = (self.column / mxfp4::LEN, self.k / mxfp4::LEN);
                let first = place * stride + first;
                let codes = &self.bytes[first * mxfp4::CODES..][..blocks * mxfp4::CODES];
                Cow::Owned(mxfp4::joined(codes, &scales[first..first + blocks]))
            }
        }
    }

    /// Where the file has output `row`.
    fn place(&self, row: usize) -> usize {
        let [first, every] = self.rows;
        first + every * self.interleaved.map_or(row, |head_dim| adjacent(row, head_dim))
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
            return bytes;
        }
        let mut values = vec![0.0; self.k];
        quant::dequantize(self.stored, &bytes, &mut values);
        let made = quant::quantize(self.dtype, &values);
        Cow::Owned(made.expect("a mix has only types with a quantiser; this is a bug"))
    }

    /// Lets the pages of the rows go (and, where heads are interleaved, of their whole heads).
    fn packed(&self, rows: Range<usize>) {
        let head = self.interleaved.unwrap_or(1);
        let rows = rows.start / head * head..rows.end.next_multiple_of(head).min(self.n);
        let ([first, every], stride) = match self.form {
            Form::Rows(stride) => (self.rows, stride),
            Form::Codes(blocks, _) => (self.rows, blocks * mxfp4::CODES),
            Form::Columns(_) => return, // every row is on every page
        };
        if let Some(file) = self.file.filter(|_| !rows.is_empty()) {
            let [first, last] = [rows.start, rows.end - 1].map(|row| first + every * row);
            file.release_slice(&self.bytes[first * stride..(last + 1) * stride]);
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

    /// Matrices of floats are quantised on the way; codes of experts in MXFP4 stay what they are,
    /// others are refused by [`Loader::check`].
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
            let stacked = self.stacked(role);
            let dtype = self.check_weight(&name, &shape, stacked)?;
            let made = self.made(role, dtype);
            if self.mix.is_some() && dtype.block_len() > 1 && !self.stays(role, dtype) {
                let what = format!("is {dtype} already: only floats are quantised while loading");
                return Err(Error::Tensor { name, what });
            }
            if let Some(part) = self.part {
                part.check(role, &shape, &[dtype, made])
                    .map_err(|what| Error::Tensor { name: name.clone(), what })?;
            }
            used.extend(self.weights.parts_of(&name));
            let bias = self.name(role, "bias");
            let may = self.config.may_have_bias(role) && self.weights.has(&bias);
            if may || self.config.needs_bias(role) {
                let bias_shape = match stacked {
                    None => vec![shape[0]],
                    Some(of) => vec![of.count, shape[0] * of.every],
                };
                if self.check_tensor(&bias, &bias_shape)?.block_len() > 1 {
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

    /// Codes of experts, which models are trained in, are not cut again.
    fn stays(&self, role: L::Role, stored: DType) -> bool {
        stored == DType::MXFP4 && self.stacked(role).is_some()
    }

    /// The type that a matrix is handed out in.
    fn made(&self, role: L::Role, stored: DType) -> DType {
        let mix = self.mix.filter(|_| !self.stays(role, stored));
        match mix.and_then(|mix| self.config.mixed(role, mix)) {
            Some(mixed) => mixed,
            None if stored.block_len() == 1 && self.config.decides(role) => DType::F32,
            None => stored,
        }
    }

    /// The same, of a matrix that nobody asked for yet.
    pub(crate) fn dtype(&self, role: L::Role) -> Result<DType> {
        let name = self.name(role, "weight");
        let stored = match mxfp4::names(self.weights, &name) {
            Some(_) => DType::MXFP4,
            None => self.weights.readable(&name)?,
        };
        Ok(self.made(role, stored))
    }

    fn check_weight(&self, name: &str, shape: &[usize], stacked: Option<Stacked>) -> Result<DType> {
        let (Some(of), &[n, k]) = (stacked, shape) else {
            return self.check_tensor(name, shape);
        };
        if let Some(names) = mxfp4::names(self.weights, name).filter(|_| of.turned) {
            mxfp4::check(self.weights, &names, [of.count, n * of.every, k])?;
            return Ok(DType::MXFP4);
        }
        if !of.turned {
            return self.check_tensor(name, &[of.count, n * of.every, k]);
        }
        let dtype = self.check_tensor(name, &[of.count, k, n * of.every])?;
        if dtype.block_len() > 1 {
            let (name, what) = (name.to_owned(), format!("is {dtype}, by columns"));
            return Err(Error::Tensor { name, what });
        }
        Ok(dtype)
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
        let tensors = names.iter().flat_map(|name| self.weights.parts_of(name));
        tensors.for_each(|name| self.weights.release(&name));
        Ok(taken)
    }

    /// What a matrix is made of.
    fn source(&mut self, role: L::Role, name: &str) -> Result<MatrixSource<'a>> {
        let &[n, k] = &self.config.shape(role)[..] else {
            return Err(Error::Tensor { name: name.to_owned(), what: "is not a matrix".into() });
        };
        let (weights, of) = (self.weights, self.stacked(role).unwrap_or(Stacked::ALONE));
        let (stored, bytes, form) = match mxfp4::names(weights, name).filter(|_| of.turned) {
            Some([codes, scales]) => {
                let [codes, scales] = [&codes, &scales].map(|name| of.own(weights.bytes(name)));
                (DType::MXFP4, codes, Form::Codes(k / mxfp4::LEN, scales))
            }
            None => {
                let (stored, bytes) = (weights.readable(name)?, of.own(weights.bytes(name)));
                let form = match of.turned {
                    true => Form::Columns(n * of.every),
                    false => Form::Rows(bytes.len() / (n * of.every).max(1)),
                };
                (stored, bytes, form)
            }
        };
        let scales = if let Form::Codes(_, scales) = form { scales.len() } else { 0 };
        self.tell((bytes.len() + scales) * of.count, of);
        let (row, column, [own_n, own_k]) = match self.part {
            None => (0, 0, [n, k]),
            Some(part) => part.of(role, [n, k]),
        };
        Ok(MatrixSource {
            dtype: self.made(role, stored),
            stored,
            n: own_n,
            k: own_k,
            bytes,
            form,
            rows: [of.first + row * of.every, of.every],
            column,
            interleaved: self.config.interleaved(role),
            file: weights.parts_of(name).first().and_then(|name| weights.file_of(name)),
        })
    }

    fn stacked(&self, role: L::Role) -> Option<Stacked> {
        self.config.stacked(role, self.weights.format())
    }

    /// A norm, or what else is as long as its heads or its rows.
    pub fn vector(&mut self, role: L::Role) -> Result<Vec<f32>> {
        self.read_ahead(role, 1);
        let name = self.name(role, "weight");
        let len = self.config.shape(role)[0];
        let mut out = self.numbers(role, &name, len, Stacked::ALONE)?;
        if self.config.counts_from_one(role) {
            out.iter_mut().for_each(|x| *x += 1.0);
        }
        Ok(out)
    }

    /// The bias of a projection, where the file has one. Where the outputs of ranks are added up,
    /// the first rank has it.
    pub fn bias(&mut self, role: L::Role) -> Result<Option<Vec<f32>>> {
        let name = self.name(role, "bias");
        let later = |part: &Part<L>| part.adds_up(role, self.config) && part.rank > 0;
        let of = self.stacked(role).unwrap_or(Stacked::ALONE);
        if !self.weights.has(&name) {
            return Ok(None);
        }
        if self.part.is_some_and(later) {
            self.tell(self.weights.bytes(&name).len(), of);
            return Ok(None);
        }
        let len = self.config.shape(role)[0];
        self.numbers(role, &name, len, of).map(Some)
    }

    /// `len` numbers of a tensor, or those of them that a rank has.
    fn numbers(&mut self, role: L::Role, name: &str, len: usize, of: Stacked) -> Result<Vec<f32>> {
        let (stored, bytes) = (self.weights.readable(name)?, self.weights.bytes(name));
        self.tell(bytes.len(), of);
        let (first, n) = match self.part {
            None => (0, len),
            Some(part) => {
                let (first, _, [n, _]) = part.of(role, [len, 1]);
                (first, n)
            }
        };
        let mut all = vec![0.0; len * of.every];
        quant::dequantize(stored, of.own(bytes), &mut all);
        let place = |i| self.config.interleaved(role).map_or(i, |head_dim| adjacent(i, head_dim));
        let values = (0..n).map(|i| all[of.first + of.every * (first + place(i))]).collect();
        self.weights.release(name);
        Ok(values)
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
                let tensors = name.iter().flat_map(|name| self.weights.parts_of(name));
                tensors.for_each(|name| self.weights.will_need(&name));
            }
            asked = name;
        }
    }

    /// Tells of a tensor of so many bytes. Each matrix of one, and each rank, tells its share, so
    /// that all of them tell the whole.
    fn tell(&mut self, bytes: usize, of: Stacked) {
        let (rank, ranks) = self.part.map_or((0, 1), |part| (part.rank, part.size));
        let share = (of.index * of.every + of.first) * ranks + rank;
        let told = |share: usize| {
            (bytes as u128 * share as u128 / (of.count * of.every * ranks) as u128) as usize
        };
        (self.progress)(told(share + 1) - told(share));
    }
}

#[cfg(test)]
mod tests {
    use hearth_kernels::experts::Routing;

    use super::*;
    use crate::tiny;
    use crate::weights::Role;

    #[test]
    fn what_decides_is_handed_out_as_f32() {
        let experts = Some(Routing { count: 8, used: 2, normalized: true });
        let config = ModelConfig { experts, ..tiny::config() };
        for stored in [DType::F16, DType::BF16] {
            let weights = tiny::weights(&config, stored, 1).unwrap();
            let mut progress = |_| {};
            let mut loader = Loader::new(&weights, &config, &mut progress);
            let taken = |source: &MatrixSource<'_>| {
                let [mut row, mut want] = [vec![0.0; source.k], vec![0.0; source.k]];
                quant::dequantize(source.dtype, &source.row(3), &mut row);
                quant::dequantize(stored, &source.stored_row(3), &mut want);
                assert_eq!(row, want);
                Ok((source.stored, source.dtype))
            };
            assert_eq!(loader.matrix(Role::Router(1), taken).unwrap(), (stored, DType::F32));
            assert_eq!(loader.matrix(Role::ExpertUp(1, 0), taken).unwrap(), (stored, stored));
        }
    }
}
