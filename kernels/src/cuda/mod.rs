//! The same operations on an NVIDIA GPU: rows, weights, keys and values in its memory.
//!
//! [`Gpu`] is one device with one stream: everything runs in the order in which it is asked for,
//! and nothing is waited for but what is read back, when somebody opens the [`Parcel`]. Kernels are
//! `cuda/*.cu`, compiled by `build.rs`, loaded once; large products are cuBLAS. Memory of rows goes
//! round in an arena, so a pass no larger than one before asks the driver for none, and a pass
//! whose shape repeats can be recorded and replayed as one graph ([`Gpu::record`]).
//!
//! Every function here checks shapes on the host before it launches: what reaches a kernel is in
//! bounds. Deliberately absent: layers, requests, and any choice of device.

mod attention;
mod experts;
mod gpu;
mod linear;
mod lora;
mod matrix;
mod memory;
#[cfg(feature = "nccl")]
mod nccl;
mod parcel;
mod rows;
mod sampling;
mod step;
mod tensor;

pub use attention::{AttentionShape, DeviceKv, KvKind, RopeTable, Turn};
pub use experts::{ExpertWeights, MOST_USED};
pub use gpu::{Error, Gpu, Graph, Result, describe};
pub use lora::{LoraGroup, LoraInput, LoraPart};
pub use matrix::{Matrix, Vector};
pub use memory::Buffer;
#[cfg(feature = "nccl")]
pub use nccl::Communicators;
pub use parcel::Parcel;
pub use rows::{Float, Rows};
pub use sampling::{Choices, Pick};
pub use step::{HostStep, Span, Step, StepShape};
