//! LoRA adapters: files made for a base model to low-rank factors by role, checked.
//!
//! `peft` reads what Hugging Face PEFT writes, `gguf` what llama.cpp converts from it; both say
//! which tensors are the update of which weight, and everything after that is one way. Factors are
//! in the order in which this house keeps the base's rows, whatever file the base comes from, and
//! live in memory of their own: nothing of the file is needed afterwards. Runs on whatever thread
//! asks; an [`Adapter`] is immutable and shared.
//!
//! The files are untrusted: every tensor's name, shape, rank and every number is checked before
//! use, and memory is taken only for bytes that are really there. What would make the model another
//! one than the adapter was trained as (whole modules, biases, experts, another kind of adapter) is
//! refused by name. Deliberately absent: ids, and who may use an adapter.

mod gguf;
mod merge;
mod norms;
mod peft;

pub use merge::Merge;

use std::path::Path;
use std::sync::Arc;

use hearth_kernels::Pool;
use hearth_kernels::lora::{Factors, Float};
use hearth_kernels::quant;

use crate::config::ModelConfig;
use crate::open::ModelFile;
use crate::weights::{DType, Format, Role, Weights};
use crate::{Error, Result};

/// The updates of one adapter, for one base model.
#[derive(Debug)]
pub struct Adapter {
    deltas: Vec<(Role, Delta)>,
}

/// The update of one weight `W [n, k]`: `W + scale * B A`, its rows stretched to the magnitude of
/// DoRA where there is one.
#[derive(Clone, Debug)]
pub struct Delta {
    /// A and B.
    pub factors: Arc<Factors>,
    /// Multiplies `B A`.
    pub scale: f32,
    /// Lengths of the rows.
    pub dora: Option<Arc<Dora>>,
}

/// Weight decomposition (Liu et al. 2024): row `i` of `W + scale * B A` is as long as
/// `magnitude[i]`. Of an embedding it is the columns, which are its outputs.
#[derive(Debug)]
pub struct Dora {
    /// `[n]`
    pub magnitude: Vec<f32>,
    /// Lengths of the rows of `W + scale * B A`. `[n]`
    pub norm: Vec<f32>,
}

impl Dora {
    /// By what each row is stretched. `[n]`
    pub(crate) fn ratio(&self) -> Vec<f32> {
        self.magnitude.iter().zip(&self.norm).map(|(magnitude, norm)| magnitude / norm).collect()
    }
}

/// Where the numbers of one update are, and what they mean.
struct Planned {
    role: Role,
    /// `[rank, k]`
    a: String,
    /// The file has A as `[k, rank]`.
    a_is_turned: bool,
    /// `[n, rank]`
    b: String,
    /// `[n]`
    magnitude: Option<String>,
    scale: Scale,
}

/// What multiplies `B A`.
enum Scale {
    /// `alpha / rank`, of whatever rank the tensors have.
    Alpha(f32),
    /// This, of tensors that must have that rank.
    Known { scale: f32, rank: usize },
}

impl Adapter {
    /// Opens an adapter for `base`: a PEFT folder (`adapter_config.json` and
    /// `adapter_model.safetensors`), the weights in one, or a `.gguf` adapter.
    ///
    /// # Errors
    /// Files that are no adapter, or one of another model: the tensor and both shapes are named.
    pub fn open(path: &Path, base: &ModelFile, pool: &Pool) -> Result<Self> {
        let files = peft::files(path)?;
        let weights = Weights::open(&files.weights)?;
        let planned = match (weights.format(), &files.config) {
            (Format::Gguf, _) => gguf::plan(&weights, base.config())?,
            (Format::SafeTensors, Some(json)) => peft::plan(&weights, json, base.config())?,
            (Format::SafeTensors, None) => {
                let what = "is missing: a PEFT adapter has one beside its weights";
                return Err(Error::config("adapter_config.json", what));
            }
        };
        let mut deltas = Vec::with_capacity(planned.len());
        for plan in &planned {
            deltas.push((plan.role, take(&weights, plan, base, pool)?));
        }
        Self::from_deltas(base.config(), deltas)
    }

    /// Whether the files of an adapter are there; what is in them is not looked at.
    ///
    /// # Errors
    /// What is missing.
    pub fn is_at(path: &Path) -> Result<()> {
        let files = peft::files(path)?;
        let is_gguf = |item: std::io::Result<std::fs::DirEntry>| {
            item.is_ok_and(|item| item.path().extension().is_some_and(|end| end == "gguf"))
        };
        let there = match (files.weights.is_file(), &files.config) {
            (true, _) => true,
            (false, Some(_)) => false,
            (false, None) => std::fs::read_dir(path).is_ok_and(|mut all| all.any(is_gguf)),
        };
        let what = "is missing: an adapter is a folder with adapter_config.json and this file, or \
                    a .gguf file";
        there.then_some(()).ok_or_else(|| Error::config("adapter_model.safetensors", what))
    }

    /// Of updates that are made in memory.
    ///
    /// # Errors
    /// A weight that the model has not, or an update of another shape.
    pub fn from_deltas(config: &ModelConfig, deltas: Vec<(Role, Delta)>) -> Result<Self> {
        let adapter = Self { deltas };
        adapter.check(config)?;
        Ok(adapter)
    }

    /// Whether it fits a model.
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<()> {
        let targets = targets(config);
        for (i, (role, delta)) in self.deltas.iter().enumerate() {
            let name = role.name(false, "weight");
            let known = shape(*role, config).filter(|_| targets.contains(role));
            let (Some([n, k]), factors) = (known, &delta.factors) else {
                return Err(Error::Tensor { name, what: "takes no update".into() });
            };
            if (factors.n(), factors.k()) != (n, k) || factors.is_table() != is_table(*role) {
                let (n, k) = (factors.n(), factors.k());
                let what = format!("has an update of [{n}, {k}], and the model none such");
                return Err(Error::Tensor { name, what });
            }
            if self.deltas[..i].iter().any(|(other, _)| other == role) {
                return Err(Error::Tensor { name, what: "is updated twice".into() });
            }
        }
        Ok(())
    }

    /// Its updates.
    pub fn deltas(&self) -> &[(Role, Delta)] {
        &self.deltas
    }

    /// The update of one weight.
    pub fn get(&self, role: Role) -> Option<&Delta> {
        self.deltas.iter().find(|(known, _)| *known == role).map(|(_, delta)| delta)
    }

    /// Tells everything that its updates follow from, byte by byte.
    pub fn tell(&self, listener: &mut dyn FnMut(&[u8])) {
        for (role, delta) in &self.deltas {
            let Delta { factors, scale, dora } = delta;
            let sizes = (factors.n(), factors.k(), factors.rank(), factors.bytes());
            listener(
                format!("{role:?} {sizes:?} {} {}\n", scale.to_bits(), dora.is_some()).as_bytes(),
            );
            for numbers in [factors.to_a(), factors.to_b()] {
                listener(bytemuck::cast_slice(&numbers));
            }
            if let Some(dora) = dora {
                listener(bytemuck::cast_slice(&dora.magnitude));
                listener(bytemuck::cast_slice(&dora.norm));
            }
        }
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        let dora = |delta: &Delta| delta.dora.as_ref().map_or(0, |dora| 8 * dora.norm.len());
        self.deltas.iter().map(|(_, delta)| delta.factors.bytes() + dora(delta)).sum()
    }
}

/// `[n, k]` of an update: of an embedding, the outputs are its columns.
pub(crate) fn shape(role: Role, config: &ModelConfig) -> Option<[usize; 2]> {
    match (role, &role.shape(config)[..]) {
        (Role::Embedding, &[vocab, hidden]) => Some([hidden, vocab]),
        // Adapters of routers and experts have no kernels.
        (Role::Router(_), _) => None,
        (role, &[n, k]) if role.expert(config).is_none() => Some([n, k]),
        _ => None,
    }
}

/// Its input is ids.
pub(crate) fn is_table(role: Role) -> bool {
    role == Role::Embedding
}

/// Roles that an adapter may update: every matrix, and the head of a tied model too.
pub(crate) fn targets(config: &ModelConfig) -> Vec<Role> {
    let mut all = Role::all(config);
    all.retain(|role| shape(*role, config).is_some());
    if config.tied {
        all.push(Role::Head);
    }
    all
}

fn take(weights: &Weights, plan: &Planned, base: &ModelFile, pool: &Pool) -> Result<Delta> {
    let config = base.config();
    let target = shape(plan.role, config);
    let [n, k] = target.expect("only matrices are planned; this is a bug");
    let a_shape = two(weights, &plan.a)?;
    let b_shape = two(weights, &plan.b)?;
    let rank = b_shape[1];
    let a_wanted = if plan.a_is_turned { [k, rank] } else { [rank, k] };
    let fits = |name: &str, found: [usize; 2], wanted: [usize; 2]| match found == wanted {
        true => Ok(()),
        false => {
            let (target, of) = (plan.role.shape(config), plan.role.name(false, "weight"));
            let what = format!(
                "has shape {found:?}, {wanted:?} is wanted: `{of}` of the model is {target:?}"
            );
            Err(Error::Tensor { name: name.to_owned(), what })
        }
    };
    fits(&plan.b, b_shape, [n, rank])?;
    fits(&plan.a, a_shape, a_wanted)?;
    let scale = match plan.scale {
        _ if rank == 0 => {
            return Err(Error::Tensor { name: plan.b.clone(), what: "has rank 0".into() });
        }
        Scale::Known { rank: said, .. } if said != rank => {
            let what = format!("has rank {rank}, the configuration says {said}");
            return Err(Error::Tensor { name: plan.b.clone(), what });
        }
        Scale::Known { scale, .. } => scale,
        Scale::Alpha(0.0) => 1.0,
        Scale::Alpha(alpha) => alpha / rank as f32,
    };
    let (mut a, a_float) = numbers(weights, &plan.a)?;
    let (b, b_float) = numbers(weights, &plan.b)?;
    if plan.a_is_turned {
        a = (0..rank * k).map(|i| a[i % k * rank + i / k]).collect();
    }
    let b = in_order(b, rank, weights.format(), plan.role, config);
    let float = if a_float == b_float { a_float } else { Float::F32 };
    let shape = [n, k, rank];
    let factors = match is_table(plan.role) {
        true => Factors::of_table(float, shape, &a, &b),
        false => Factors::new(float, shape, &a, &b),
    };
    let dora = match &plan.magnitude {
        None => None,
        Some(name) => {
            let magnitude = magnitude(weights, name, n)?;
            let norm = norms::lengths(base, plan.role, scale, rank, &a, &b, pool)?;
            if norm.iter().any(|norm| !norm.is_finite() || *norm <= 0.0) {
                let what = "stretches a row of zeros".into();
                return Err(Error::Tensor { name: name.clone(), what });
            }
            Some(Arc::new(Dora { magnitude, norm }))
        }
    };
    Ok(Delta { factors: Arc::new(factors), scale, dora })
}

/// Rows of B in our order: a GGUF adapter of a Llama type has those of Q and K as its base's file
/// has them, for rotation of adjacent pairs.
fn in_order(
    b: Vec<f32>,
    rank: usize,
    format: Format,
    role: Role,
    config: &ModelConfig,
) -> Vec<f32> {
    let family = crate::families::by_name(config.family);
    let rotates = matches!(role, Role::Q(_) | Role::K(_));
    if format != Format::Gguf || !rotates || !family.is_some_and(|f| f.gguf_interleaved_qk) {
        return b;
    }
    let mut out = Vec::with_capacity(b.len());
    for row in 0..b.len() / rank {
        let from = crate::weights::adjacent(row, config.head_dim);
        out.extend_from_slice(&b[from * rank..(from + 1) * rank]);
    }
    out
}

fn two(weights: &Weights, name: &str) -> Result<[usize; 2]> {
    weights.readable(name)?;
    match weights.info(name).map_or(&[][..], |info| &info.shape) {
        &[n, k] => Ok([n, k]),
        other => {
            let what = format!("has shape {other:?} and is no matrix");
            Err(Error::Tensor { name: name.to_owned(), what })
        }
    }
}

/// The numbers of a tensor, all finite, and how they are kept without losing a bit.
fn numbers(weights: &Weights, name: &str) -> Result<(Vec<f32>, Float)> {
    let view = weights.tensor(name)?;
    let mut out = vec![0.0; view.shape.iter().product()];
    quant::dequantize(view.dtype, view.bytes, &mut out);
    if out.iter().any(|x| !x.is_finite()) {
        let what = "holds a number that is not finite".into();
        return Err(Error::Tensor { name: name.to_owned(), what });
    }
    let float = match view.dtype {
        DType::F16 => Float::F16,
        DType::BF16 => Float::BF16,
        _ => Float::F32,
    };
    Ok((out, float))
}

/// `[n]`, or `[1, n]` as embeddings have it.
fn magnitude(weights: &Weights, name: &str, n: usize) -> Result<Vec<f32>> {
    weights.readable(name)?;
    let found = weights.info(name).map_or(&[][..], |info| &info.shape);
    if found != [n] && found != [1, n] {
        let what = format!("has shape {found:?}, [{n}] is wanted");
        return Err(Error::Tensor { name: name.to_owned(), what });
    }
    Ok(numbers(weights, name)?.0)
}
