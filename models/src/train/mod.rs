//! Training on the plain path: the decoder that inference is compared with is the one that learns.
//!
//! [`Trainer`] owns the decoder and the optimiser, [`Schedule`] says how fast to learn, [`data`]
//! turns tokens into batches, [`random`] makes a model that knows nothing. One optimiser step cuts
//! its batch into as many parts as there are threads; each part has its own forward and backward
//! pass, the gradients are added. Deliberately absent: text, files, when to stop.

mod adamw;
pub mod data;
mod muon;
mod rng;
mod schedule;
mod trainer;

pub use adamw::{AdamW, AdamWOptions};
pub use data::{Batch, Example, Loader as DataLoader};
pub use muon::{Muon, MuonOptions};
pub use rng::Rng;
pub use schedule::Schedule;
pub use trainer::{StepReport, Trainer};

use hearth_kernels::quant::DType;

use crate::ModelConfig;
use crate::tiny;
use crate::weights::gguf_writer::GgufWriter;

/// A GGUF file of a model that knows nothing: normal weights of deviation `0.02` (the two that
/// write to the residual stream are smaller by the root of their number), norms of 1, biases of 0.
/// It has no metadata.
pub fn random(config: &ModelConfig, seed: u64) -> std::io::Result<Vec<u8>> {
    let mut rng = Rng::new(seed);
    let residual = 1.0 / (2.0 * config.layer_count as f32).sqrt();
    let shapes = tiny::shapes(config);
    let mut writer = GgufWriter::new();
    for (name, shape) in &shapes {
        writer.tensor(name, shape, DType::F32)?;
    }
    let mut body = writer.write_header(Vec::new())?;
    for (name, shape) in &shapes {
        let writes = name.contains("attn_output") || name.contains("ffn_down");
        let scale = match (shape.len(), name.ends_with("norm.weight")) {
            (2, _) if writes => Some(0.02 * residual * 2.0),
            (2, _) => Some(0.02 * 2.0),
            _ => None,
        };
        let rest = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let bytes: Vec<u8> = (0..shape.iter().product())
            .flat_map(|_| scale.map_or(rest, |s| s * rng.normal()).to_le_bytes())
            .collect();
        body.write_tensor(&bytes)?;
    }
    body.finish()
}
