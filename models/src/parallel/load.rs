//! From devices to ranks: who meets where, and what each loads.

#[cfg(feature = "nccl")]
use std::sync::Arc;

#[cfg(feature = "nccl")]
use hearth_kernels::cuda::{Communicators, Gpu};

use super::{Group, Parallel};
#[cfg(feature = "nccl")]
use crate::backend::Cuda;
use crate::backend::{Fused, Plain};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::open::Compute;
use crate::weights::Loader;
use crate::{Error, Model, Result};

/// Loads a decoder onto several of a kind.
pub(crate) fn load(
    ranks: &[Compute],
    config: &ModelConfig,
    loader: &mut Loader<'_>,
) -> Result<Box<dyn Model>> {
    let group = Group::new(ranks.len());
    #[cfg(feature = "nccl")]
    let gpus = gpus(ranks)?;
    #[cfg(feature = "nccl")]
    let group = match gpus.is_empty() {
        true => group,
        false => Group::of_devices(Communicators::new(gpus.clone())?),
    };
    let model = Parallel::load(config, group, |part, seat| {
        let (config, loader) = (part.config.clone(), &mut loader.part(part));
        Ok(match &ranks[part.rank] {
            Compute::Fused(pool) => {
                let ops = Fused::new(pool.clone()).seated(seat);
                Box::new(Decoder::load(config, loader, ops)?)
            }
            Compute::Plain(device, dtype) => {
                let ops = Plain::new(device.clone(), *dtype).seated(seat);
                Box::new(Decoder::load(config, loader, ops)?)
            }
            #[cfg(feature = "nccl")]
            Compute::Cuda(_) => {
                let ops = Cuda::new(Arc::clone(&gpus[part.rank])).seated(seat);
                Box::new(Decoder::load(config, loader, ops)?)
            }
            _ => return Err(Error::Device("such ranks are not in this build".into())),
        })
    })?;
    Ok(Box::new(model))
}

/// The devices of ranks on GPUs.
#[cfg(feature = "nccl")]
fn gpus(ranks: &[Compute]) -> Result<Vec<Arc<Gpu>>> {
    let index = |rank: &Compute| match rank {
        Compute::Cuda(index) => Some(*index),
        _ => None,
    };
    ranks.iter().filter_map(index).map(|i| Ok(Arc::new(Gpu::new(i)?))).collect()
}
