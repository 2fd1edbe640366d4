//! A model as a GGUF file, its matrices in the types of a mix, written tensor by tensor.
//!
//! From GGUF everything but the types is kept as it is. From SafeTensors the configuration becomes
//! metadata, and what GGUF has no words for is refused. Adapters are merged into the rows on their
//! way. The vocabulary is the caller's: text is not known here. At no time is more than one tensor
//! in memory; the file appears under its name only when it is complete.

mod words;

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::sync::{Arc, Mutex};

use hearth_kernels::Pool;
use hearth_kernels::matmul::Rows;
use hearth_kernels::quant::{self, DType};

use crate::adapter::{Adapter, Merge};
use crate::config::RopeScaling;
use crate::open::ModelFile;
use crate::weights::gguf_writer::GgufWriter;
use crate::weights::{self, Format, Layout, Loader, Mix, Role, Value};
use crate::{Error, Result};
use words::{entries, family};

/// Metadata that a copy writes anew, or that speaks of the old file.
const NOT_COPIED: [&str; 4] =
    ["general.alignment", "general.file_type", "general.quantization_version", "split."];

/// What to write.
pub struct Export<'a> {
    /// The model.
    pub file: &'a ModelFile,
    /// The types.
    pub mix: Mix,
    /// Quantises.
    pub pool: &'a Pool,
    /// Merged into the weights, each as often as its weight says.
    pub adapters: &'a [(Arc<Adapter>, f32)],
}

/// A tensor on its way.
struct Planned {
    /// In the file that is written: name, outermost dimension first, type.
    to: String,
    shape: Vec<usize>,
    dtype: DType,
    from: Source,
    /// Head width, where rows go from the order of halves to that of adjacent pairs.
    interleave: Option<usize>,
    /// Head width, where the file that is written has adjacent pairs.
    adjacent: Option<usize>,
    /// The source has what is to be added to one.
    from_one: bool,
    /// What adapters add.
    merge: Option<Merge>,
}

/// What a tensor is made of.
enum Source {
    /// Tensors of the source, one behind the other.
    Tensors(Vec<String>),
    /// Matrices of experts that lie otherwise in the source, one behind the other.
    Experts(Vec<Role>),
    /// Their biases.
    Biases(Vec<Role>),
}

/// What becomes of the numbers of a row.
type Change<'a> = &'a (dyn Fn(usize, &mut [f32]) + Sync);

impl Export<'_> {
    /// Writes the file. `put` adds the metadata that is not the architecture's; `progress` is told
    /// the bytes of the source as they are taken.
    pub fn write(
        &self,
        path: &Path,
        put: &mut dyn FnMut(&mut GgufWriter) -> io::Result<()>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(name);
        let io = |source| weights::Error::Io { path: path.to_owned(), source };
        let made = self.write_to(&part, put, progress);
        let made = made.and_then(|()| Ok(std::fs::rename(&part, path).map_err(io)?));
        if made.is_err() {
            let _ = std::fs::remove_file(&part); // the first error is the one to tell
        }
        made
    }

    fn write_to(
        &self,
        path: &Path,
        put: &mut dyn FnMut(&mut GgufWriter) -> io::Result<()>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let io = |source| weights::Error::Io { path: path.to_owned(), source };
        let divisors = self.divisors();
        let plan = self.plan()?;
        let mut writer = GgufWriter::new();
        self.put_metadata(&mut writer, path)?;
        put(&mut writer).map_err(io)?;
        if let Some(divisors) = &divisors {
            writer.tensor(DIVISORS, &[divisors.len()], DType::F32).map_err(io)?;
        }
        for tensor in &plan {
            writer.tensor(&tensor.to, &tensor.shape, tensor.dtype).map_err(io)?;
        }
        let file = File::create(path).map_err(io)?;
        let mut body = writer.write_header(BufWriter::new(file)).map_err(io)?;
        if let Some(divisors) = &divisors {
            let bytes: Vec<u8> = divisors.iter().flat_map(|x| x.to_le_bytes()).collect();
            body.write_tensor(&bytes).map_err(io)?;
        }
        for tensor in &plan {
            body.write_tensor(&self.made(tensor, progress)?).map_err(io)?;
        }
        let file = body.finish().map_err(io)?;
        file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
        Ok(())
    }

    /// Every tensor of the file, in the order of its layers.
    fn plan(&self) -> Result<Vec<Planned>> {
        let (weights, config) = (self.file.weights(), self.file.config());
        let format = weights.format();
        let family = family(config)?;
        let mut plan: Vec<Planned> = Vec::new();
        for role in Role::all(config) {
            let rotates = matches!(role, Role::Q(_) | Role::K(_)) && family.gguf_interleaved_qk;
            let adjacent = rotates.then_some(config.head_dim);
            for bias in [false, true] {
                let suffix = if bias { "bias" } else { "weight" };
                let name = |format| config.name(role, format, suffix);
                let (from, to) = (name(format), name(Format::Gguf));
                let there = weights.parts_of(&from).iter().all(|name| weights.has(name));
                if !there || bias && !config.may_have_bias(role) {
                    continue;
                }
                let wanted = if bias { DType::F32 } else { self.mix.dtype(role, config) };
                let [index, count] = role.expert(config).unwrap_or([0, 0]);
                let dtype = self.allowed(&from, wanted, count > 0)?;
                if index > 0 {
                    // Of one tensor with the expert before it.
                    let whole = plan.iter_mut().rev().find(|tensor| tensor.to == to);
                    match &mut whole.expect("experts follow each other; this is a bug").from {
                        Source::Tensors(names) if format != Format::Gguf => names.push(from),
                        Source::Tensors(_) => {}
                        Source::Experts(roles) | Source::Biases(roles) => roles.push(role),
                    }
                    continue;
                }
                let apart = format != Format::Gguf && config.stacked(role, format).is_some();
                let mut shape = role.shape(config);
                shape.truncate(if bias { 1 } else { shape.len() });
                shape.splice(..0, (count > 0).then_some(count));
                plan.push(Planned {
                    to,
                    shape,
                    dtype,
                    from: match (apart, bias) {
                        (false, _) => Source::Tensors(vec![from]),
                        (true, false) => Source::Experts(vec![role]),
                        (true, true) => Source::Biases(vec![role]),
                    },
                    interleave: adjacent.filter(|_| format != Format::Gguf),
                    adjacent,
                    from_one: config.counts_from_one(role),
                    merge: Merge::new(role, if bias { &[] } else { self.adapters }),
                });
            }
        }
        self.untie(&mut plan)?;
        let head = Role::Head.name(true, "weight");
        if family.gguf_always_tied && plan.iter().any(|tensor| tensor.to == head) {
            let what = "false, or an adapter of one of both, cannot be written to GGUF here";
            return Err(Error::config("tie_word_embeddings", what));
        }
        if let Some(info) = weights.info(DIVISORS).filter(|_| format == Format::Gguf) {
            let (shape, dtype) = (info.shape.clone(), weights.readable(DIVISORS)?);
            plan.push(Planned::copy(DIVISORS, DIVISORS.to_owned(), shape, dtype));
        }
        Ok(plan)
    }

    /// A head that is tied to the embedding becomes one of its own where adapters change only one
    /// of them.
    fn untie(&self, plan: &mut Vec<Planned>) -> Result<()> {
        let (weights, config) = (self.file.weights(), self.file.config());
        let updated = |role| self.adapters.iter().any(|(adapter, _)| adapter.get(role).is_some());
        if !config.tied || !(updated(Role::Embedding) || updated(Role::Head)) {
            return Ok(());
        }
        let from = config.name(Role::Embedding, weights.format(), "weight");
        let dtype = self.allowed(&from, self.mix.dtype(Role::Head, config), false)?;
        let to = Role::Head.name(true, "weight");
        let copy = Planned::copy(&from, to, Role::Head.shape(config), dtype);
        plan.push(Planned { merge: Merge::new(Role::Head, self.adapters), ..copy });
        Ok(())
    }

    /// The type to write a tensor in. What lost bits already is not cut again: codes of experts in
    /// MXFP4, which models are trained in, stay what they are, others are refused.
    fn allowed(&self, name: &str, wanted: DType, of_experts: bool) -> Result<DType> {
        let weights = self.file.weights();
        let stored = match weights.has(name) {
            true => weights.readable(name)?,
            false => DType::MXFP4, // codes and scales apart
        };
        match stored {
            DType::MXFP4 if of_experts => Ok(stored),
            DType::Q8_0 => Ok(wanted),
            float if float.block_len() == 1 => Ok(wanted),
            same if same == wanted => Ok(wanted),
            _ => {
                let what = format!("is {stored} already: quantise from floats, or from Q8_0");
                Err(Error::Tensor { name: name.to_owned(), what })
            }
        }
    }

    /// The bytes of a tensor, as it is written.
    fn made(&self, tensor: &Planned, progress: &mut dyn FnMut(usize)) -> Result<Vec<u8>> {
        let weights = self.file.weights();
        let mut whole = Vec::new();
        match &tensor.from {
            Source::Tensors(names) => {
                for from in names {
                    progress(weights.info(from).map_or(0, |info| info.len_bytes()));
                    let part = self.converted(tensor, from)?;
                    weights.release(from);
                    if names.len() == 1 {
                        return Ok(part);
                    }
                    whole.reserve_exact(names.len() * part.len() - whole.len());
                    whole.extend_from_slice(&part);
                }
            }
            Source::Experts(roles) => {
                let mut loader = Loader::new(weights, self.file.config(), progress);
                let row_bytes = tensor.shape.last().and_then(|k| tensor.dtype.row_bytes(*k));
                let rows: usize = tensor.shape.iter().rev().skip(1).product();
                whole.reserve_exact(rows * row_bytes.unwrap_or(0));
                loader.matrices(roles, |sources| {
                    for source in sources {
                        let row = |row| source.row(row);
                        let from = (source.dtype, &row as &(dyn Fn(usize) -> _ + Sync));
                        let made =
                            self.rows(&tensor.to, tensor.dtype, [source.n, source.k], from, None)?;
                        whole.extend_from_slice(&made);
                    }
                    Ok(())
                })?;
            }
            Source::Biases(roles) => {
                let mut loader = Loader::new(weights, self.file.config(), progress);
                for role in roles {
                    let bias = loader.bias(*role)?.unwrap_or_default();
                    whole.extend(bias.iter().flat_map(|x| x.to_le_bytes()));
                }
            }
        }
        Ok(whole)
    }

    /// The bytes of a tensor of the source, or of a part of it, in its new type.
    fn converted(&self, tensor: &Planned, from: &str) -> Result<Vec<u8>> {
        let view = self.file.weights().tensor(from)?;
        // A vector is one row, unless its elements change places.
        let (n, k) = match (view.shape, tensor.interleave) {
            (&[n, k], _) => (n, k),
            (&[count, n, k], _) => (count * n, k),
            (shape, Some(_)) => (shape.iter().product(), 1),
            (shape, None) => (1, shape.iter().product()),
        };
        let row_bytes = view.bytes.len() / n;
        let row = |row| {
            let row = place(row, tensor.interleave);
            Cow::Borrowed(&view.bytes[row * row_bytes..][..row_bytes])
        };
        let change = |row, values: &mut [f32]| {
            if tensor.from_one {
                values.iter_mut().for_each(|x| *x += 1.0);
            }
            if let Some(merge) = &tensor.merge {
                merge.add_to(place(row, tensor.adjacent), values);
            }
        };
        let changes = tensor.from_one || tensor.merge.is_some();
        let change = changes.then_some(&change as Change<'_>);
        self.rows(from, tensor.dtype, [n, k], (view.dtype, &row), change)
    }

    /// Rows in another type. `[n, k]`
    fn rows<'r>(
        &self,
        name: &str,
        dtype: DType,
        [n, k]: [usize; 2],
        (stored, row): (DType, &(dyn Fn(usize) -> Cow<'r, [u8]> + Sync)),
        change: Option<Change<'_>>,
    ) -> Result<Vec<u8>> {
        let row_bytes = dtype.row_bytes(k).unwrap_or(0);
        let mut out = vec![0; n * row_bytes];
        // A megabyte or so of floats a task.
        let rows = (1_usize << 18).div_ceil(k);
        let parts: Vec<Mutex<&mut [u8]>> =
            out.chunks_mut(rows * row_bytes).map(Mutex::new).collect();
        let strange = Mutex::new(false);
        self.pool.run(parts.len(), &|task| {
            let mut part = parts[task].lock().expect("one task a part; this is a bug");
            let mut values = vec![0.0; k];
            for (i, out) in part.chunks_mut(row_bytes).enumerate() {
                let source = row(task * rows + i);
                if stored == dtype && change.is_none() {
                    out.copy_from_slice(&source);
                    continue;
                }
                quant::dequantize(stored, &source, &mut values);
                if let Some(change) = change {
                    change(task * rows + i, &mut values);
                }
                if values.iter().any(|x| !x.is_finite()) {
                    *strange.lock().expect("set only; this is a bug") = true;
                    return;
                }
                let made = quant::quantize(dtype, &values);
                out.copy_from_slice(&made.expect("a mix has quantisers; this is a bug"));
            }
        });
        if strange.into_inner().expect("set only; this is a bug") {
            let what = "holds a number that is not finite".into();
            return Err(Error::Tensor { name: name.to_owned(), what });
        }
        Ok(out)
    }

    fn put_metadata(&self, writer: &mut GgufWriter, path: &Path) -> Result<()> {
        let io = |source| weights::Error::Io { path: path.to_owned(), source };
        writer.put("general.file_type", Value::U32(self.mix.file_type())).map_err(io)?;
        writer.put("general.quantization_version", Value::U32(2)).map_err(io)?;
        match self.file.weights().metadata() {
            Some(meta) => {
                let kept = |key: &&str| !NOT_COPIED.iter().any(|no| key.starts_with(no));
                for key in meta.keys().filter(kept) {
                    if let Some(value) = meta.value(key)? {
                        writer.put(key, value).map_err(io)?;
                    }
                }
            }
            None => {
                for (key, value) in entries(self.file.config())? {
                    writer.put(&key, value).map_err(io)?;
                }
            }
        }
        Ok(())
    }

    /// `rope_freqs.weight` of a configuration that GGUF has no other words for.
    fn divisors(&self) -> Option<Vec<f32>> {
        let rope = &self.file.config().rope;
        let from_json = self.file.weights().metadata().is_none();
        let stretched = matches!(rope.scaling, RopeScaling::Llama3 { .. }) && from_json;
        stretched.then(|| crate::layers::rotary::divisors(rope))
    }
}

impl Planned {
    /// Of one tensor of the source, its rows as they are.
    fn copy(from: &str, to: String, shape: Vec<usize>, dtype: DType) -> Self {
        let from = Source::Tensors(vec![from.to_owned()]);
        let (interleave, adjacent, from_one, merge) = (None, None, false, None);
        Self { to, shape, dtype, from, interleave, adjacent, from_one, merge }
    }
}

const DIVISORS: &str = "rope_freqs.weight";

/// Where the source has row `row` of the file to be written: a head's row `2 j + s` is
/// `s * half + j` of one whose halves rotate together.
fn place(row: usize, interleave: Option<usize>) -> usize {
    match interleave {
        Some(head_dim) => {
            let (head, r) = (row / head_dim, row % head_dim);
            head * head_dim + r % 2 * (head_dim / 2) + r / 2
        }
        None => row,
    }
}
