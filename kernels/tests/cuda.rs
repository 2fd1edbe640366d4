//! The kernels on a GPU against the CPU's, which are the truth.
//!
//! Without a GPU every test says so and passes; `HEARTH_GPU=1` makes that a failure. Each test
//! prints its worst error (`--nocapture` shows it) and lists its failed cases, not only the first.
#![cfg(feature = "cuda")]

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/bidirectional.rs"]
mod bidirectional;
#[path = "cuda/blocks.rs"]
mod blocks;
#[path = "cuda/experts.rs"]
mod experts;
#[path = "cuda/graph.rs"]
mod graph;
#[path = "cuda/linear.rs"]
mod linear;
#[path = "cuda/lora.rs"]
mod lora;
#[cfg(feature = "nccl")]
#[path = "cuda/nccl.rs"]
mod nccl;
#[path = "cuda/overlap.rs"]
mod overlap;
#[path = "cuda/report.rs"]
mod report;
#[path = "cuda/rows.rs"]
mod rows;
#[path = "cuda/sampling.rs"]
mod sampling;
#[path = "cuda/world.rs"]
mod world;
