//! What adapters cost: decode steps of eight sequences with the base model, with one adapter, and
//! with eight different ones, on random weights of a 1B shape.
//!
//! `cargo bench --bench lora`

use std::sync::Arc;
use std::time::Instant;

use hearth_kernels::Pool;
use hearth_kernels::lora::Float;
use hearth_kernels::pool::default_threads;
use hearth_kernels::quant::DType;
use hearth_models::weights::Role;
use hearth_models::{
    Adapter, Compute, ForwardBatch, KvDType, KvStore, LoraSlot, Model, ModelConfig, tiny,
};

const BLOCK_LEN: usize = 16;
const CONTEXT: usize = 256;
const SEQUENCES: usize = 8;
const RANK: usize = 16;
const ROUNDS: usize = 9;
const STEPS: usize = 8;

fn config() -> ModelConfig {
    let mut config = tiny::config();
    (config.hidden_len, config.ffn_len, config.layer_count) = (2048, 8192, 16);
    (config.head_count, config.kv_head_count, config.head_dim) = (32, 8, 64);
    (config.rope.dim, config.vocab_len) = (64, 32_000);
    config.windows = vec![None; 16];
    config
}

/// Of every projection of every layer.
fn adapter(config: &ModelConfig, float: Float, seed: u64) -> Arc<Adapter> {
    let full = tiny::adapter(config, RANK, float, seed).expect("an adapter");
    let of_layers =
        full.deltas().iter().filter(|(r, _)| !matches!(r, Role::Embedding | Role::Head));
    Arc::new(Adapter::from_deltas(config, of_layers.cloned().collect()).expect("it fits"))
}

/// One new row of each sequence behind a context.
fn step(slots: [Option<u64>; SEQUENCES]) -> ForwardBatch {
    let mut batch = ForwardBatch::empty();
    let blocks = (CONTEXT / BLOCK_LEN + 1) as u32;
    for (s, slot) in (0..).zip(slots) {
        batch.push(&[s + 3], CONTEXT, (s * blocks..(s + 1) * blocks).collect(), BLOCK_LEN);
        batch.run_last_with(slot.map(LoraSlot));
        batch.logit_rows.push(s);
    }
    batch
}

/// Milliseconds a step of each batch, in turns, so that a disturbed minute is everybody's.
fn rounds(model: &dyn Model, kv: &mut KvStore, batches: &[ForwardBatch; 3]) -> Vec<[f64; 3]> {
    let mut round = || {
        batches.each_ref().map(|batch| {
            let start = Instant::now();
            for _ in 0..STEPS {
                model.forward(batch, kv).expect("a step");
            }
            start.elapsed().as_secs_f64() * 1e3 / STEPS as f64
        })
    };
    round();
    (0..ROUNDS).map(|_| round()).collect()
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn main() {
    let pool = Arc::new(Pool::new(default_threads()));
    let config = config();
    for dtype in [DType::Q8_0, DType::Q4_0] {
        let compute = Compute::Fused(Arc::clone(&pool));
        let mut model = tiny::load(&config, dtype, 7, &compute).expect("a model");
        let blocks = SEQUENCES * (CONTEXT / BLOCK_LEN + 1);
        let geometry = model.config().kv_geometry(blocks, BLOCK_LEN, KvDType::default());
        let mut kv = model.kv_store(geometry).expect("a store");
        println!("{dtype}, {} threads, medians of {ROUNDS} rounds in turns", pool.threads());
        for float in [Float::BF16, Float::F32] {
            let start = Instant::now();
            for slot in 0..SEQUENCES as u64 {
                let list = [(adapter(&config, float, slot), 1.0)];
                model.put_adapters(LoraSlot(slot), &list).expect("it fits");
            }
            let made = start.elapsed().as_secs_f64() * 1e3 / SEQUENCES as f64;
            let own = std::array::from_fn(|s| Some(s as u64));
            let batches = [[None; SEQUENCES], [Some(0); SEQUENCES], own].map(step);
            let times = rounds(&*model, &mut kv, &batches);
            let ms = |i: usize| median(times.iter().map(|times| times[i]));
            let part = |i: usize| median(times.iter().map(|times| times[0] / times[i]));
            println!(
                "  rank {RANK} {float:?}: base {:.1} ms a step of {SEQUENCES}, one adapter {:.1} \
                 ms ({:.2} of the base's rate), eight {:.1} ms ({:.2}); made in {made:.0} ms each",
                ms(0),
                ms(1),
                part(1),
                ms(2),
                part(2)
            );
            (0..SEQUENCES as u64).for_each(|slot| model.drop_adapters(LoraSlot(slot)));
        }
    }
}
