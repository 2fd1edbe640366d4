//! A model as a GGUF file, its matrices in the types of a mix, written tensor by tensor.
//!
//! From GGUF everything but the types is kept as it is. From SafeTensors the configuration becomes
//! metadata, and what GGUF has no words for is refused. Adapters are merged into the rows on their
//! way. The vocabulary is the caller's: text is not known here. At no time is more than one tensor
//! in memory; the file appears under its name only when it is complete.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::sync::{Arc, Mutex};

use hearth_kernels::Pool;
use hearth_kernels::quant::{self, DType};

use crate::adapter::{Adapter, Merge};
use crate::config::{ModelConfig, RawConfig, RopeConfig, RopeScaling, yarn_temperature};
use crate::families;
use crate::open::ModelFile;
use crate::weights::gguf_writer::GgufWriter;
use crate::weights::{self, Layout, Mix, Role, Value, Weights};
use crate::{Error, Result};

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
    /// In the source, one behind the other.
    from: Vec<String>,
    /// The source has one for each expert, the file that is written all in one.
    stacks: bool,
    /// In the file that is written.
    to: String,
    dtype: DType,
    /// Head width, where rows go from the order of halves to that of adjacent pairs.
    interleave: Option<usize>,
    /// Head width, where the file that is written has adjacent pairs.
    adjacent: Option<usize>,
    /// The source has what is to be added to one.
    from_one: bool,
    /// What adapters add.
    merge: Option<Merge>,
}

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
        let (weights, divisors) = (self.file.weights(), self.divisors());
        let plan = self.plan()?;
        let mut writer = GgufWriter::new();
        self.put_metadata(&mut writer, path)?;
        put(&mut writer).map_err(io)?;
        if let Some(divisors) = &divisors {
            writer.tensor(DIVISORS, &[divisors.len()], DType::F32).map_err(io)?;
        }
        for tensor in &plan {
            let shape = weights.info(&tensor.from[0]).map_or(&[][..], |info| &info.shape);
            let stacked = tensor.stacks.then_some(tensor.from.len());
            let shape: Vec<usize> = stacked.into_iter().chain(shape.iter().copied()).collect();
            writer.tensor(&tensor.to, &shape, tensor.dtype).map_err(io)?;
        }
        let file = File::create(path).map_err(io)?;
        let mut body = writer.write_header(BufWriter::new(file)).map_err(io)?;
        if let Some(divisors) = &divisors {
            let bytes: Vec<u8> = divisors.iter().flat_map(|x| x.to_le_bytes()).collect();
            body.write_tensor(&bytes).map_err(io)?;
        }
        for tensor in &plan {
            let mut whole = Vec::new();
            for from in &tensor.from {
                progress(weights.info(from).map_or(0, |info| info.len_bytes()));
                let part = self.converted(tensor, from)?;
                weights.release(from);
                if tensor.from.len() == 1 {
                    whole = part;
                } else {
                    whole.reserve_exact(tensor.from.len() * part.len() - whole.len());
                    whole.extend_from_slice(&part);
                }
            }
            body.write_tensor(&whole).map_err(io)?;
        }
        let file = body.finish().map_err(io)?;
        file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
        Ok(())
    }

    /// Every tensor of the file, in the order of its layers.
    fn plan(&self) -> Result<Vec<Planned>> {
        let (weights, config) = (self.file.weights(), self.file.config());
        let from_gguf = weights.metadata().is_some();
        let family = family(config)?;
        let mut plan = Vec::new();
        for role in Role::all(config) {
            let rotates = matches!(role, Role::Q(_) | Role::K(_)) && family.gguf_interleaved_qk;
            let adjacent = rotates.then_some(config.head_dim);
            let interleave = adjacent.filter(|_| !from_gguf);
            for (suffix, dtype) in [("weight", self.mix.dtype(role, config)), ("bias", DType::F32)]
            {
                let (from, to) = (role.name(from_gguf, suffix), role.name(true, suffix));
                if !weights.has(&from) {
                    continue;
                }
                let dtype = allowed(weights, &from, dtype)?;
                if role.expert(config).is_some_and(|[index, _]| index > 0) {
                    // Of one tensor with the expert before it.
                    let whole = plan.last_mut().filter(|tensor: &&mut Planned| tensor.to == to);
                    let whole = whole.expect("experts follow each other; this is a bug");
                    if !from_gguf {
                        whole.from.push(from);
                    }
                    continue;
                }
                let updated = if suffix == "weight" { self.adapters } else { &[] };
                let (from, merge) = (vec![from], Merge::new(role, updated));
                let from_one = config.counts_from_one(role);
                let stacks = role.expert(config).is_some() && !from_gguf;
                plan.push(Planned {
                    from,
                    stacks,
                    to,
                    dtype,
                    interleave,
                    adjacent,
                    from_one,
                    merge,
                });
            }
        }
        self.untie(&mut plan)?;
        let head = Role::Head.name(true, "weight");
        if family.gguf_always_tied && plan.iter().any(|tensor| tensor.to == head) {
            let what = "false, or an adapter of one of both, cannot be written to GGUF here";
            return Err(Error::config("tie_word_embeddings", what));
        }
        if from_gguf && weights.has(DIVISORS) {
            let dtype = weights.readable(DIVISORS)?;
            let (from, to) = (vec![DIVISORS.to_owned()], DIVISORS.to_owned());
            let (interleave, adjacent, from_one, merge) = (None, None, false, None);
            let stacks = false;
            plan.push(Planned { from, stacks, to, dtype, interleave, adjacent, from_one, merge });
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
        let from = Role::Embedding.name(weights.metadata().is_some(), "weight");
        let dtype = allowed(weights, &from, self.mix.dtype(Role::Head, config))?;
        let (to, merge) = (Role::Head.name(true, "weight"), Merge::new(Role::Head, self.adapters));
        let (interleave, adjacent, from_one, from) = (None, None, false, vec![from]);
        let stacks = false;
        plan.push(Planned { from, stacks, to, dtype, interleave, adjacent, from_one, merge });
        Ok(())
    }

    /// The bytes of a tensor, or of a part of it, in its new type.
    fn converted(&self, tensor: &Planned, from: &str) -> Result<Vec<u8>> {
        let view = self.file.weights().tensor(from)?;
        // A vector is one row, unless its elements change places.
        let (n, k) = match (view.shape, tensor.interleave) {
            (&[n, k], _) => (n, k),
            (&[count, n, k], _) => (count * n, k),
            (shape, Some(_)) => (shape.iter().product(), 1),
            (shape, None) => (1, shape.iter().product()),
        };
        let row_bytes = tensor.dtype.row_bytes(k).unwrap_or(0);
        let source_bytes = view.bytes.len() / n;
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
                let row = place(task * rows + i, tensor.interleave);
                let source = &view.bytes[row * source_bytes..][..source_bytes];
                if view.dtype == tensor.dtype && tensor.merge.is_none() && !tensor.from_one {
                    out.copy_from_slice(source);
                    continue;
                }
                quant::dequantize(view.dtype, source, &mut values);
                if tensor.from_one {
                    values.iter_mut().for_each(|x| *x += 1.0);
                }
                if let Some(merge) = &tensor.merge {
                    merge.add_to(place(task * rows + i, tensor.adjacent), &mut values);
                }
                if values.iter().any(|x| !x.is_finite()) {
                    *strange.lock().expect("set only; this is a bug") = true;
                    return;
                }
                let made = quant::quantize(tensor.dtype, &values);
                out.copy_from_slice(&made.expect("a mix has quantisers; this is a bug"));
            }
        });
        if strange.into_inner().expect("set only; this is a bug") {
            let what = "holds a number that is not finite".into();
            return Err(Error::Tensor { name: from.to_owned(), what });
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

/// The type to write a tensor in. What lost bits already is not cut again.
fn allowed(weights: &Weights, name: &str, wanted: DType) -> Result<DType> {
    let stored = weights.readable(name)?;
    let near_float = stored.block_len() == 1 || stored == DType::Q8_0;
    if near_float || stored == wanted {
        return Ok(wanted);
    }
    let what = format!("is {stored} already: quantise from a model in floats, or in Q8_0");
    Err(Error::Tensor { name: name.to_owned(), what })
}

fn family(config: &ModelConfig) -> Result<&'static families::Family> {
    let unknown = || Error::config("family", format!("`{}` has no name in GGUF", config.family));
    families::by_name(config.family).ok_or_else(unknown)
}

/// A configuration in the words of GGUF.
fn entries(config: &ModelConfig) -> Result<Vec<(String, Value<'static>)>> {
    // Mistral is a Llama there.
    let arch = family(config)?.gguf_architectures.first().copied().unwrap_or("llama");
    let key = |name: &str| format!("{arch}.{name}");
    let count = |n: usize| Value::U32(n as u32); // every length was checked to be below 2^32
    let float = |x: f64| Value::F32(x as f32);
    let mut all = vec![
        ("general.architecture".to_owned(), Value::Str(arch)),
        (key("block_count"), count(config.layer_count)),
        (key("context_length"), count(config.context_len)),
        (key("embedding_length"), count(config.hidden_len)),
        (key("feed_forward_length"), count(config.ffn_len)),
        (key("attention.head_count"), count(config.head_count)),
        (key("attention.head_count_kv"), count(config.kv_head_count)),
        (key("attention.key_length"), count(config.head_dim)),
        (key("attention.value_length"), count(config.head_dim)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(config.norm_eps)),
        (key("rope.dimension_count"), count(config.rope.dim)),
        (key("rope.freq_base"), float(config.rope.base)),
        (key("vocab_size"), count(config.vocab_len)),
    ];
    all.extend(of_layers(config, arch)?);
    match &config.rope.scaling {
        // Llama 3 stands in a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => {}
        RopeScaling::Linear { factor } => {
            all.push((key("rope.scaling.type"), Value::Str("linear")));
            all.push((key("rope.scaling.factor"), float(*factor)));
        }
        &RopeScaling::Yarn { truncate: false, .. } => {
            return Err(Error::config("rope_scaling", "`truncate: false` has no word in GGUF"));
        }
        &RopeScaling::Yarn {
            factor,
            original_context_len,
            beta_fast,
            beta_slow,
            attention_factor,
            ..
        } => {
            all.push((key("rope.scaling.type"), Value::Str("yarn")));
            all.push((key("rope.scaling.factor"), float(factor)));
            let original = count(original_context_len as usize);
            all.push((key("rope.scaling.original_context_length"), original));
            all.push((key("rope.scaling.yarn_beta_fast"), float(beta_fast)));
            all.push((key("rope.scaling.yarn_beta_slow"), float(beta_slow)));
            if let Some(attention) = attention_factor {
                let factor = attention / yarn_temperature(factor, 1.0);
                all.push((key("rope.scaling.attn_factor"), float(factor)));
            }
        }
    }
    Ok(all)
}

/// Windows, bounds and what else a family says of its layers, if whoever reads the file will see
/// the same.
fn of_layers(config: &ModelConfig, arch: &str) -> Result<Vec<(String, Value<'static>)>> {
    let (knobs, window) = (&config.knobs, config.windows.iter().copied().flatten().next());
    let number = |x: Option<f32>| x.map(f64::from);
    let raw = RawConfig {
        hidden_size: Some(config.hidden_len),
        num_hidden_layers: Some(config.layer_count),
        num_attention_heads: Some(config.head_count),
        head_dim: Some(config.head_dim),
        sliding_window: Some(window),
        attn_logit_softcapping: number(knobs.attention_softcap).map(Some),
        final_logit_softcapping: number(knobs.logit_softcap).map(Some),
        gguf_rope: Some(config.rope.clone()),
        ..RawConfig::default()
    };
    let reader = families::by_gguf_architecture(arch).unwrap_or(family(config)?);
    if (reader.windows)(&raw, config.layer_count)? != config.windows {
        let what = "cannot be written to GGUF for this family or these layers";
        return Err(Error::config("sliding_window", what));
    }
    let read = (reader.knobs)(&raw);
    for (key, differs) in [
        (
            "query_pre_attn_scalar",
            read.query_scale(config.head_dim) != knobs.query_scale(config.head_dim),
        ),
        ("attn_logit_softcapping", read.attention_softcap != knobs.attention_softcap),
        ("final_logit_softcapping", read.logit_softcap != knobs.logit_softcap),
    ] {
        if differs {
            return Err(Error::config(key, "cannot be written to GGUF for this family"));
        }
    }
    let key = |name: &str| format!("{arch}.{name}");
    let mut experts = Vec::new();
    if let Some(routing) = config.experts {
        if !routing.normalized {
            let what = "false has no word in GGUF: readers add weights up to one";
            return Err(Error::config("norm_topk_prob", what));
        }
        for (name, count) in [
            ("expert_count", routing.count),
            ("expert_used_count", routing.used),
            ("expert_feed_forward_length", config.ffn_len),
        ] {
            experts.push((key(name), Value::U32(count as u32)));
        }
    }
    let window = window.map(|n| (key("attention.sliding_window"), Value::U32(n as u32)));
    let cap = |name, cap: Option<f32>| cap.map(|cap| (key(name), Value::F32(cap)));
    let caps = [
        cap("attn_logit_softcapping", knobs.attention_softcap),
        cap("final_logit_softcapping", knobs.logit_softcap),
    ];
    let local = match &config.local_rope {
        None => None,
        Some(RopeConfig { base, dim, scaling: RopeScaling::None }) if *dim == config.rope.dim => {
            Some((key("rope.freq_base_swa"), Value::F32(*base as f32)))
        }
        Some(_) => {
            let what = "of layers with a window cannot be written to GGUF";
            return Err(Error::config("rope_parameters", what));
        }
    };
    Ok(experts.into_iter().chain(window).chain(caps.into_iter().flatten()).chain(local).collect())
}
