//! What the device itself can do: memory copied, numbers multiplied.

use std::time::Instant;

use hearth_kernels::cuda::{Float, Gpu, KvKind};
use hearth_kernels::quant::DType;

use super::Failure;
use super::table::{Row, digits, median};
use super::weights;

/// What everything else is held against.
pub struct Ceiling {
    /// Bytes read and bytes written, a second.
    pub copy: f64,
    /// Operations of products in bf16, a second.
    pub product: f64,
}

/// Rows and columns of the product.
const SIDE: usize = 8192;
/// Tokens of 8 heads of 128 in bf16 that are copied at once: 512 MiB of keys, as much of values.
const COPIED: usize = 1 << 18;
const ROUNDS: usize = 5;

/// Measures both, and prints them.
pub fn measure() -> Result<Ceiling, Failure> {
    let gpu = Gpu::new(0)?;
    let (free, total) = gpu.memory()?;
    let ceiling = Ceiling { copy: copy(&gpu)?, product: product(&gpu)? };
    let name = gpu.name();
    let memory = format!("{:.0} of {:.0} GB free", free as f64 / 1e9, total as f64 / 1e9);
    let gb = format!("{} GB/s", digits(ceiling.copy / 1e9));
    Row::new(&name, "copy, read and written").rate(gb).part(memory).print();
    let tera = format!("{} TFLOP/s", digits(ceiling.product / 1e12));
    Row::new(&name, format!("bf16 product, {SIDE}^3")).rate(tera).print();
    Ok(ceiling)
}

/// Keys and values of one large block to another. They are zeros: what is copied is a little
/// cheaper than numbers would be, and what is held against it looks a little worse.
fn copy(gpu: &Gpu) -> Result<f64, Failure> {
    let kv = gpu.kv(1, [2, COPIED, 8, 128], KvKind::BF16)?;
    let bytes = (COPIED * 8 * 128 * 2) as f64;
    let time = each(gpu, 10, || Ok(gpu.copy_block(&kv, 0, 1)?))?;
    Ok(2.0 * 2.0 * bytes / time)
}

/// A product of many rows, as prompts ask for it.
fn product(gpu: &Gpu) -> Result<f64, Failure> {
    let bytes = weights::matrix(DType::BF16, [SIDE, SIDE], 1);
    let row = |i: usize| (&bytes[i * SIDE * 2..(i + 1) * SIDE * 2]).into();
    let weights = gpu.matrix(DType::BF16, [SIDE, SIDE], row, |_| ())?;
    let number = |pair: &[u8]| f32::from_bits(u32::from_le_bytes([0, 0, pair[0], pair[1]]));
    let values: Vec<f32> = bytes.chunks_exact(2).map(number).collect();
    let x = gpu.rows_from(&values, SIDE, Float::BF16)?;
    let time = each(gpu, 20, || {
        gpu.linear(&x, [(&weights, None)])?;
        Ok(())
    })?;
    Ok(2.0 * (SIDE as f64).powi(3) / time)
}

/// Seconds of one `work` of so many that are asked for together.
pub fn each(
    gpu: &Gpu,
    count: usize,
    mut work: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..=ROUNDS {
        let start = Instant::now();
        (0..count).try_for_each(|_| work())?;
        gpu.synchronize()?;
        times.push(start.elapsed().as_secs_f64() / count as f64);
    }
    Ok(median(&times[1..]))
}
