//! From a path to a model: which files, which device, which path.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use hearth_kernels::Pool;
#[cfg(feature = "cuda")]
use hearth_kernels::cuda;
use hearth_kernels::matmul::Packed;

#[cfg(feature = "cuda")]
use crate::backend::Cuda;
use crate::backend::{Fused, Plain};
use crate::config::{EncoderConfig, ModelConfig};
use crate::decoder::Decoder;
use crate::encoder::Encoder;
use crate::kv_store::{KvDType, in_slabs_alone, stored_as};
use crate::parallel;
use crate::weights::{Layout, Loader, MatrixSource, Mix, Part, Role, TensorInfo, Weights};
use crate::{Error, Model, Result, TextEncoder};

/// Where and how to compute. The only place that chooses a device.
#[derive(Clone)]
pub enum Compute {
    /// Our kernels on this machine's processor.
    Fused(Arc<Pool>),
    /// Our kernels on the GPU with this number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
    /// Candle on a device.
    Plain(Device, DType),
    /// Several of one of these, among which every layer of a decoder is divided. Encoders run on
    /// the first.
    Ranks(Vec<Compute>),
}

impl Compute {
    /// `cpu`, `plain` (candle on the CPU, the reference), `cuda`, `cuda:N`, `metal`, or `auto`: an
    /// accelerator that this build has and this machine too, else `cpu`.
    pub fn parse(name: &str, pool: &Arc<Pool>) -> Result<Self> {
        let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
        let unknown = || {
            let known = "auto, cpu, cuda, cuda:N, metal or plain";
            Error::Device(format!("`{name}` is not a device; choose {known}"))
        };
        let absent = |feature: &str| {
            let build = format!("cargo build --release --features {feature}");
            Error::Device(format!("this build has no `{name}`; build Hearth with `{build}`"))
        };
        let index: usize = index.parse().map_err(|_| unknown())?;
        let accelerator = |device: candle_core::Result<Device>| match device {
            Ok(device) => Ok(Self::Plain(device, DType::BF16)),
            Err(e) => Err(Error::Device(format!("device `{name}` cannot be used: {e}"))),
        };
        match kind {
            "cpu" => Ok(Self::Fused(Arc::clone(pool))),
            "plain" => Ok(Self::Plain(Device::Cpu, DType::F32)),
            "cuda" if cfg!(not(feature = "cuda")) => Err(absent("cuda")),
            "metal" if cfg!(not(feature = "metal")) => Err(absent("metal")),
            "cuda" => Self::cuda(index)
                .map_err(|e| Error::Device(format!("device `{name}` cannot be used: {e}"))),
            "metal" => accelerator(Device::new_metal(index)),
            "auto" => {
                let metal = || Device::new_metal(0).map(|device| Self::Plain(device, DType::BF16));
                let found = Self::cuda(0).or_else(|_| metal());
                Ok(found.unwrap_or_else(|_| Self::Fused(Arc::clone(pool))))
            }
            _ => Err(unknown()),
        }
    }

    /// How keys and values are stored on the device of a name where nobody says it, in two bytes a
    /// number: as our kernels for the CPU do it best where it is sure that they will run, else in
    /// f16, which all devices have.
    pub fn kv_dtype(name: &str) -> KvDType {
        let alone = cfg!(not(any(feature = "cuda", feature = "metal")));
        match name.split_once(':').map_or(name, |(kind, _)| kind) {
            "cpu" => KvDType::Q16_0,
            "auto" if alone => KvDType::Q16_0,
            _ => KvDType::F16,
        }
    }

    /// A GPU that is there.
    #[cfg(feature = "cuda")]
    fn cuda(index: usize) -> Result<Self> {
        cuda::describe(index)?;
        Ok(Self::Cuda(index))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_: usize) -> Result<Self> {
        Err(Error::Device("this build has no CUDA".into()))
    }

    /// So many ranks in place of one: GPUs with this number and those that follow, or, to try it,
    /// parts of this machine's processor.
    ///
    /// # Errors
    /// A device that is missing, or that cannot be one of several.
    pub fn divided(self, size: usize) -> Result<Self> {
        let cannot = |what: &str| Err(Error::Device(what.into()));
        match self {
            one if size == 1 => Ok(one),
            _ if size == 0 => cannot("a model is on one device at least"),
            Self::Fused(pool) => {
                let threads = (pool.threads() / size).max(1);
                let rank = |_| Self::Fused(Arc::new(Pool::new(threads)));
                Ok(Self::Ranks((0..size).map(rank).collect()))
            }
            Self::Plain(device, dtype) if device.is_cpu() => {
                Ok(Self::Ranks(vec![Self::Plain(device, dtype); size]))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(_) if cfg!(not(feature = "nccl")) => cannot(
                "this build has no NCCL; build Hearth with `cargo build --release --features nccl`",
            ),
            #[cfg(feature = "cuda")]
            Self::Cuda(first) => {
                let rank = |index| {
                    let unusable = |e| Error::Device(format!("`cuda:{index}` cannot be used: {e}"));
                    Self::cuda(index).map_err(unusable)
                };
                Ok(Self::Ranks((first..first + size).map(rank).collect::<Result<_>>()?))
            }
            Self::Plain(..) => cannot("a model is divided among NVIDIA GPUs or on the CPU"),
            Self::Ranks(_) => cannot("a model is divided once"),
        }
    }

    /// What computes what is not divided.
    fn first(&self) -> &Self {
        match self {
            Self::Ranks(ranks) => ranks.first().unwrap_or(self),
            one => one,
        }
    }

    /// Ranks, and how many of them have the same memory.
    pub fn ranks(&self) -> (usize, usize) {
        match self {
            Self::Ranks(ranks) if self.free_bytes().is_some() => (ranks.len(), 1),
            Self::Ranks(ranks) => (ranks.len(), ranks.len()),
            _ => (1, 1),
        }
    }

    /// The plain path on the same device, for training: f32, candle variables as weights.
    pub fn trainable(&self) -> Result<Plain> {
        let device = match self {
            Self::Fused(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Device::new_cuda(*index)?,
            Self::Plain(device, _) => device.clone(),
            Self::Ranks(_) => return Err(Error::Device("training runs on one device".into())),
        };
        Ok(Plain::new(device, DType::F32).trainable())
    }

    /// For logs and `doctor`.
    pub fn describe(&self) -> String {
        match self {
            Self::Fused(pool) => format!("cpu, own kernels, {} threads", pool.threads()),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => {
                let name = cuda::describe(*index).map_or_else(|e| e.to_string(), |(name, _)| name);
                format!("cuda:{index}, own kernels, {name}")
            }
            Self::Plain(device, dtype) => format!("{:?}, candle, {dtype:?}", device.location()),
            Self::Ranks(ranks) => {
                let each: Vec<String> = ranks.iter().map(Self::describe).collect();
                format!("{} ranks of every layer: {}", ranks.len(), each.join("; "))
            }
        }
    }

    /// Refuses a type of keys and values that is not stored there.
    pub fn check_kv(&self, dtype: KvDType) -> Result<()> {
        match self {
            Self::Fused(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Cuda::check_kv(dtype).map(drop),
            Self::Plain(device, _) => stored_as(dtype, device.is_cpu()).map(drop),
            Self::Ranks(ranks) => ranks.iter().try_for_each(|rank| rank.check_kv(dtype)),
        }
    }

    /// The type whose room keys and values of a type take there: what candle has no tensors of, the
    /// plain path keeps as f32.
    pub fn kv_room(&self, dtype: KvDType) -> KvDType {
        match self.first() {
            Self::Plain(..) if in_slabs_alone(dtype) => KvDType::F32,
            _ => dtype,
        }
    }

    /// Refuses to keep blocks of keys and values in files where they do not leave the device.
    pub fn check_kv_leaves(&self) -> Result<()> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => {
                let what = "keys and values on a GPU do not leave it yet; leave it out, or choose \
                            --device cpu";
                Err(Error::Device(what.into()))
            }
            Self::Ranks(_) => {
                let what = "keys and values of several ranks do not leave them; leave it out, or \
                            choose --tensor-parallel 1";
                Err(Error::Device(what.into()))
            }
            _ => Ok(()),
        }
    }

    /// Refuses to take the memory of keys and values ahead of its use where that is candle's.
    pub fn check_kv_prefault(&self) -> Result<()> {
        match self {
            Self::Plain(..) => {
                let what = "the plain path does not take memory ahead of its use; leave it out, or \
                            choose --device cpu";
                Err(Error::Device(what.into()))
            }
            Self::Ranks(ranks) => ranks.iter().try_for_each(Self::check_kv_prefault),
            _ => Ok(()),
        }
    }

    /// Memory that is free there, where that is not the machine's; on each of several.
    pub fn free_bytes(&self) -> Option<u64> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Some(cuda::describe(*index).ok()?.1 as u64),
            Self::Ranks(ranks) => ranks.iter().map(Self::free_bytes).min().flatten(),
            _ => None,
        }
    }

    /// Memory that a model's weights take on it: as packed, or widened to one float type.
    pub fn weight_bytes(&self, weights: &Weights) -> u64 {
        weights.infos().map(|(_, info)| self.first().tensor_bytes(info)).sum()
    }

    /// Memory that one tensor takes, whole.
    fn tensor_bytes(&self, info: &TensorInfo) -> u64 {
        match self {
            Self::Fused(_) | Self::Ranks(_) => info.len_bytes() as u64,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Cuda::stored_bytes(info),
            Self::Plain(_, dtype) => (info.elements() * dtype.size_in_bytes()) as u64,
        }
    }

    /// Loads a decoder onto it.
    pub fn load(&self, config: ModelConfig, loader: &mut Loader<'_>) -> Result<Box<dyn Model>> {
        Ok(match self {
            Self::Fused(pool) => {
                Box::new(Decoder::load(config, loader, Fused::new(Arc::clone(pool)))?)
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Box::new(Decoder::load(config, loader, Cuda::on(*index)?)?),
            Self::Plain(device, dtype) => {
                Box::new(Decoder::load(config, loader, Plain::new(device.clone(), *dtype))?)
            }
            Self::Ranks(ranks) => parallel::load(ranks, &config, loader)?,
        })
    }
}

/// What a path may lead to.
#[allow(clippy::large_enum_variant, reason = "one for each model, and taken apart at once")]
pub enum AnyFile {
    /// A causal language model.
    Decoder(ModelFile),
    /// An encoder.
    Encoder(EncoderFile),
}

/// A model's files, opened and understood but not yet loaded.
pub struct ModelFile {
    weights: Weights,
    config: ModelConfig,
    path: PathBuf,
    mix: Option<Mix>,
}

/// An encoder's files, opened and understood but not yet loaded.
pub struct EncoderFile {
    weights: Weights,
    config: EncoderConfig,
    path: PathBuf,
}

/// Opens a causal language model: a `.gguf` file, a `.safetensors` file or a folder; checks all
/// that can be checked without reading a weight.
pub fn open(path: &Path) -> Result<ModelFile> {
    match open_any(path)? {
        AnyFile::Decoder(file) => Ok(file),
        AnyFile::Encoder(file) => Err(Error::config(
            "model_type",
            format!("`{}` is an encoder: it embeds text and generates none", file.config.family),
        )),
    }
}

/// [`open`] for models of every kind.
pub fn open_any(path: &Path) -> Result<AnyFile> {
    let weights = Weights::open(path)?;
    let json = match weights.metadata() {
        Some(_) => None,
        None => Some(config_json(path)?),
    };
    let encoder = match &json {
        Some(text) => EncoderConfig::from_json(text, &weights)?,
        None => EncoderConfig::from_gguf(&weights)?,
    };
    let path = path.to_owned();
    if let Some(config) = encoder {
        Loader::new(&weights, &config, &mut |_| {}).check()?;
        return Ok(AnyFile::Encoder(EncoderFile { weights, config, path }));
    }
    let config = match json {
        Some(text) => ModelConfig::from_json(&text)?,
        None => ModelConfig::from_gguf(&weights)?,
    };
    Loader::new(&weights, &config, &mut |_| {}).check()?;
    Ok(AnyFile::Decoder(ModelFile { weights, config, path, mix: None }))
}

/// The text of the `config.json` beside the weights.
fn config_json(path: &Path) -> Result<String> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let file = folder.join("config.json");
    std::fs::read_to_string(&file)
        .map_err(|e| Error::config(&file.display().to_string(), format!("cannot be read: {e}")))
}

/// Opens a GGUF file that is already in memory; `name` stands for its path.
pub fn open_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<ModelFile> {
    let weights = Weights::from_bytes(name, bytes)?;
    let config = ModelConfig::from_gguf(&weights)?;
    Loader::new(&weights, &config, &mut |_| {}).check()?;
    Ok(ModelFile { weights, config, path: PathBuf::from(name), mix: None })
}

impl ModelFile {
    /// The same model, its matrices of floats quantised while they are loaded: one row at a time,
    /// so that the floats are never all in memory. Refused where a matrix is quantised already.
    pub fn quantized(self, mix: Mix) -> Result<Self> {
        Loader::new(&self.weights, &self.config, &mut |_| {}).with_mix(Some(mix)).check()?;
        Ok(Self { mix: Some(mix), ..self })
    }

    /// Refuses a device that cannot have the model: a GPU without kernels for it, or one of several
    /// that cannot divide it.
    pub fn check(&self, compute: &Compute) -> Result<()> {
        let config = self.config.divided(compute.ranks().0)?;
        #[cfg(feature = "cuda")]
        if matches!(compute.first(), Compute::Cuda(_)) {
            Cuda::check_experts(&config)?;
        }
        let Compute::Ranks(ranks) = compute else { return Ok(()) };
        let part = Part { config, rank: 0, size: ranks.len() };
        let mut progress = |_| {};
        let loader = Loader::new(&self.weights, &self.config, &mut progress);
        loader.with_mix(self.mix).part(&part).check()
    }

    /// Memory that the weights will take: as packed, or widened to one float type. Of a divided
    /// model, in each memory.
    pub fn weight_bytes(&self, compute: &Compute) -> u64 {
        let (first, (ranks, together)) = (compute.first(), compute.ranks());
        let mut progress = |_| {};
        let loader = Loader::new(&self.weights, &self.config, &mut progress).with_mix(self.mix);
        let stored = |role: &Role| self.role_bytes(*role, &loader, first);
        let roles = Role::all(&self.config);
        let whole: u64 = roles.iter().map(stored).sum();
        let own = self.config.divided(ranks).unwrap_or_else(|_| self.config.clone());
        let divided = roles.iter().filter(|role| role.shape(&own) != role.shape(&self.config));
        let divided: u64 = divided.map(stored).sum();
        (whole - divided + divided / ranks as u64) * together as u64
    }

    /// Memory that a weight will take, and its bias.
    fn role_bytes(&self, role: Role, loader: &Loader<'_>, compute: &Compute) -> u64 {
        let (shape, format) = (role.shape(&self.config), self.weights.format());
        let numbers: usize = shape.iter().product();
        let has = |suffix| self.weights.has(&self.config.name(role, format, suffix));
        let bias = if self.config.may_have_bias(role) && has("bias") { shape[0] } else { 0 };
        let bytes = match (compute, &shape[..]) {
            (Compute::Plain(_, dtype), _) => (numbers + bias) * dtype.size_in_bytes(),
            #[cfg(feature = "cuda")]
            (Compute::Cuda(_), _) => {
                let parts = self.weights.parts_of(&self.config.name(role, format, "weight"));
                let infos = parts.iter().filter_map(|name| self.weights.info(name));
                let of = self.config.stacked(role, format).map_or(1, |of| of.count * of.every);
                infos.map(Cuda::stored_bytes).sum::<u64>() as usize / of + 4 * bias
            }
            (_, &[n, k]) => {
                let packed = |dtype| Packed::bytes_of(dtype, n, k);
                loader.dtype(role).map_or(4 * numbers, packed) + 4 * bias
            }
            _ => 4 * (numbers + bias),
        };
        bytes as u64
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its tensors and metadata.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One matrix as the model is given it: its rows in our order, quantised where it is.
    pub(crate) fn matrix<T>(
        &self,
        role: Role,
        take: impl FnOnce(&MatrixSource<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut progress = |_| {};
        let loader = Loader::new(&self.weights, &self.config, &mut progress);
        loader.with_mix(self.mix).matrix(role, take)
    }

    /// Tells everything that the numbers of this model follow from, byte by byte: what it is, how
    /// it is quantised, and every tensor whole. Reads the files from end to end.
    pub fn tell(&self, listener: &mut dyn FnMut(&[u8])) {
        let mix = self.mix.map_or("as it is", |mix| mix.name());
        listener(format!("{:?} {mix} {:?}", self.config, self.weights.format()).as_bytes());
        for (name, info) in self.weights.infos() {
            let (ty, len) = (info.ty.name(), info.len_bytes());
            listener(format!("{name} {ty} {:?} {len}\n", info.shape).as_bytes());
            listener(self.weights.bytes(name));
            self.weights.release(name);
        }
    }

    /// Loads it. `progress` is told the bytes of every tensor as it is taken.
    pub fn load(
        &self,
        compute: &Compute,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Box<dyn Model>> {
        self.check(compute)?;
        // What was read to understand it: a vocabulary, samples.
        self.weights.release_all();
        let loader = Loader::new(&self.weights, &self.config, progress);
        let mut loader = loader.with_mix(self.mix);
        compute.load(self.config.clone(), &mut loader)
    }
}

impl EncoderFile {
    /// What the model is.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Its tensors and metadata.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Loads it. `progress` is told the bytes of every tensor as it is taken.
    pub fn load(
        &self,
        compute: &Compute,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Box<dyn TextEncoder>> {
        let (config, loader) =
            (self.config.clone(), &mut Loader::new(&self.weights, &self.config, progress));
        Ok(match compute.first() {
            Compute::Fused(pool) => {
                Box::new(Encoder::load(config, loader, Fused::new(Arc::clone(pool)))?)
            }
            #[cfg(feature = "cuda")]
            Compute::Cuda(index) => Box::new(Encoder::load(config, loader, Cuda::on(*index)?)?),
            Compute::Plain(device, dtype) => {
                Box::new(Encoder::load(config, loader, Plain::new(device.clone(), *dtype))?)
            }
            Compute::Ranks(_) => return Err(Error::Device("no ranks".into())),
        })
    }
}
