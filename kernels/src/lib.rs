//! Numbers only: slices in, slices out.
//!
//! | op           | what it computes                                                            |
//! |--------------|-----------------------------------------------------------------------------|
//! | `matmul`     | y = x Wᵀ, the weights in any format of `quant`, packed once                 |
//! | `kv`         | storage of K and V for one layer, in blocks; f32, f16, bf16 or bytes        |
//! | `attention`  | causal attention of a ragged batch over paged K and V; of encoders: of all  |
//! |              | rows of a sequence to all                                                   |
//! | `norm`       | RMS norm; layer norm                                                        |
//! | `rope`       | rotary embedding, half-split pairs                                          |
//! | `lora`       | low-rank updates of some rows, those of each adapter in a group              |
//! | `activation` | SiLU and GELU gates, GELU alone, a soft bound, addition and scaling         |
//! | `experts`    | which experts a row goes to, and the sum of what they make of it            |
//! | `sampling`   | one row of logits to one token, with log-probabilities                      |
//!
//! Beside the ops: `quant` (the weight formats), `buffer` (memory in huge pages), `pool` (the one
//! thread pool), `parts` (a slice that its tasks write to), `cpu` (what this processor can do),
//! `simd` (sixteen lanes for every instruction set), `cases` (awkward shapes shared by tests and
//! benches).
//!
//! # Adding an op
//! 1. One folder, `src/<op>/`, with `mod.rs`: contract, argument checks, dispatch, threads. An op
//!    of plain f32 arithmetic is a `simd::Kernel`: one text for every instruction set. One that
//!    needs other instructions has `scalar.rs` (the truth) and modules named after instruction
//!    sets.
//! 2. `mod.rs` takes a [`Pool`] when the op can use threads. The public function uses
//!    [`Isa::best`] or takes an [`Isa`]; tests run every entry of [`Isa::available`].
//! 3. Results depend on shapes and positions alone, never on the thread count or on the other rows
//!    of a batch. Sums have a fixed lane structure ([`LANES`] partial sums) in every version.
//! 4. The tolerance between versions is written in the module documentation; bitwise is the aim.
//! 5. A line in the table above, and shapes from [`cases`] in the tests.
//!
//! Deliberately absent: tensors, models, files, and every error type. Argument shapes are asserted:
//! a wrong one is a bug of the caller, and no input of a user reaches a kernel unchecked.

pub mod activation;
pub mod attention;
pub mod buffer;
pub mod cases;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod experts;
pub mod kv;
pub mod lora;
pub mod matmul;
pub mod norm;
mod parts;
pub mod pool;
pub mod quant;
pub mod rope;
pub mod sampling;
mod simd;

pub use cpu::Isa;
pub use pool::Pool;

/// Partial sums of every reduction, whatever the instruction set.
pub const LANES: usize = 16;
