//! Encoders: texts to hidden states, as an embedding asks for them.

use std::sync::Arc;
use std::time::Instant;

use hearth_kernels::cuda::Gpu;
use hearth_kernels::quant::DType;
use hearth_models::backend::{Cuda, Gelu};
use hearth_models::config::{EncoderConfig, TensorNames};
use hearth_models::encoder::Encoder;
use hearth_models::weights::Loader;
use hearth_models::{EncoderBatch, TextEncoder};

use super::limits::Ceiling;
use super::table::{Row, digits, median};
use super::{Failure, weights};

/// Texts, and tokens of each.
const SHAPES: [(usize, usize); 4] = [(1, 32), (256, 32), (64, 256), (32, 512)];
const ROUNDS: usize = 9;

/// Both encoders.
pub fn run(ceiling: &Ceiling) -> Result<(), Failure> {
    for (name, hidden_len, layer_count) in [("bert-base", 768, 12), ("bge-large", 1024, 24)] {
        let config = EncoderConfig {
            family: "bert",
            hidden_len,
            ffn_len: 4 * hidden_len,
            layer_count,
            head_count: hidden_len / 64,
            vocab_len: 30_522,
            context_len: 512,
            type_count: 2,
            norm_eps: 1e-12,
            gelu: Gelu::Erf,
            names: TensorNames::default(),
        };
        let made = weights::make(&config, |_| DType::BF16)?;
        let (mut progress, gpu) = (|_| {}, Arc::new(Gpu::new(0)?));
        let mut loader = Loader::new(&made, &config, &mut progress);
        let encoder = Encoder::load(config.clone(), &mut loader, Cuda::new(gpu))?;
        for (texts, tokens) in SHAPES {
            measure(name, &encoder, [texts, tokens], ceiling)?;
        }
    }
    Ok(())
}

fn measure(
    name: &str,
    encoder: &Encoder<Cuda>,
    [texts, tokens]: [usize; 2],
    ceiling: &Ceiling,
) -> Result<(), Failure> {
    let mut random = weights::Random(3);
    let mut batch = EncoderBatch::default();
    for _ in 0..texts {
        let ids: Vec<u32> = (0..tokens).map(|_| random.below(30_522)).collect();
        batch.push(&ids);
    }
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..=ROUNDS {
        let start = Instant::now();
        encoder.forward(&batch)?;
        times.push(start.elapsed().as_secs_f64());
    }
    let time = median(&times[1..]);
    let (config, rows) = (encoder.config(), (texts * tokens) as f64);
    let (hidden, ffn) = (config.hidden_len as f64, config.ffn_len as f64);
    let products = 2.0 * (4.0 * hidden * hidden + 2.0 * hidden * ffn);
    let attention = 4.0 * hidden * tokens as f64;
    let flops = (products + attention) * rows * config.layer_count as f64;
    Row::new(name, format!("embed {texts} x {tokens}"))
        .ms(time * 1e3)
        .tokens(rows / time)
        .rate(format!("{} TFLOP/s", digits(flops / time / 1e12)))
        .part(format!("{:.0} % of the product", 100.0 * flops / time / ceiling.product))
        .print();
    Ok(())
}
