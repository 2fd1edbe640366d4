//! Weights made on the spot: a GGUF file in memory, filled by every processor.
//!
//! Matrices keep the variance of their input, in every format, so that numbers stay small through
//! any depth of layers; norms stand around 1. They mean nothing else.

use std::sync::{Arc, Mutex};

use hearth_kernels::cuda::Gpu;
use hearth_kernels::quant::{self, DType};
use hearth_models::ModelConfig;
use hearth_models::backend::Cuda;
use hearth_models::decoder::Decoder;
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{Format, Layout, Loader, Mix, Weights};

use super::Failure;

/// Of tensors in the data of a GGUF file.
const ALIGNMENT: usize = 32;
/// Bytes that one thread fills at a time.
const PIECE: usize = 4 << 20;

/// Weights for a decoder.
pub fn of_model(config: &ModelConfig, mix: Mix) -> Result<Weights, Failure> {
    make(config, |role| mix.dtype(role, config))
}

/// Puts them on the device.
pub fn load(
    config: &ModelConfig,
    weights: &Weights,
    gpu: &Arc<Gpu>,
) -> Result<Decoder<Cuda>, Failure> {
    let mut progress = |_| {};
    let mut loader = Loader::new(weights, config, &mut progress);
    Ok(Decoder::load(config.clone(), &mut loader, Cuda::new(Arc::clone(gpu)))?)
}

/// Every tensor that a configuration asks for, its matrices in the type that `dtype` says.
pub fn make<L: Layout>(layout: &L, dtype: impl Fn(L::Role) -> DType) -> Result<Weights, Failure> {
    let mut tensors = Vec::new();
    for role in layout.roles() {
        let shape = layout.shape(role);
        let name = |suffix| layout.name(role, Format::Gguf, suffix);
        if layout.needs_bias(role) {
            tensors.push((name("bias"), shape[..1].to_vec(), DType::F32));
        }
        let dtype = if shape.len() == 2 { dtype(role) } else { DType::F32 };
        tensors.push((name("weight"), shape, dtype));
    }
    let mut writer = GgufWriter::new();
    for (name, shape, dtype) in &tensors {
        writer.tensor(name, shape, *dtype)?;
    }
    let mut head = Vec::new();
    writer.write_header(&mut head)?;
    let row_of = |shape: &[usize], dtype: DType| {
        let k = shape[shape.len() - 1];
        dtype.row_bytes(k).expect("the writer took it; this is a bug")
    };
    let len_of = |shape: &[usize], dtype: DType| {
        shape[..shape.len() - 1].iter().product::<usize>() * row_of(shape, dtype)
    };
    let lens = tensors.iter().map(|(_, shape, dtype)| len_of(shape, *dtype));
    let body: usize = lens.map(|len| len.next_multiple_of(ALIGNMENT)).sum();
    let mut bytes = vec![0; head.len() + body];
    bytes[..head.len()].copy_from_slice(&head);
    let mut rest = &mut bytes[head.len()..];
    let mut pieces = Vec::new();
    for (name, shape, dtype) in &tensors {
        let (row, len) = (row_of(shape, *dtype), len_of(shape, *dtype));
        let (tensor, after) = rest.split_at_mut(len.next_multiple_of(ALIGNMENT));
        rest = after;
        let values = match &shape[..] {
            [_, k] => Values::Matrix(*k),
            _ if name.ends_with("norm.weight") => Values::Norm,
            _ => Values::Bias,
        };
        for bytes in tensor[..len].chunks_mut((PIECE / row).max(1) * row) {
            let seed = pieces.len() as u64;
            pieces.push(Piece { bytes, dtype: *dtype, values, random: Random(seed << 32) });
        }
    }
    fill(pieces);
    Ok(Weights::from_bytes("random.gguf", bytes)?)
}

/// The bytes of one matrix.
pub fn matrix(dtype: DType, [n, k]: [usize; 2], seed: u64) -> Vec<u8> {
    let row = dtype.row_bytes(k).expect("whole blocks");
    let mut bytes = vec![0; n * row];
    let pieces = bytes.chunks_mut((PIECE / row).max(1) * row).enumerate().map(|(i, bytes)| {
        let random = Random((seed << 48) + ((i as u64) << 32));
        Piece { bytes, dtype, values: Values::Matrix(k), random }
    });
    fill(pieces.collect());
    bytes
}

/// On all processors.
fn fill(pieces: Vec<Piece<'_>>) {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let queue = Mutex::new(pieces.into_iter());
    let next = || queue.lock().expect("nobody panics with it").next();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(piece) = next() {
                    piece.fill();
                }
            });
        }
    });
}

/// What a tensor is, as far as its numbers go.
#[derive(Clone, Copy)]
enum Values {
    /// Of rows as long as that.
    Matrix(usize),
    Norm,
    Bias,
}

/// Whole rows of a tensor.
struct Piece<'a> {
    bytes: &'a mut [u8],
    dtype: DType,
    values: Values,
    random: Random,
}

impl Piece<'_> {
    fn fill(mut self) {
        let (centre, spread) = match self.values {
            Values::Matrix(k) => (0.0, (3.0 / k as f32).sqrt()),
            Values::Norm => (1.0, 0.2),
            Values::Bias => (0.0, 0.2),
        };
        match self.dtype {
            DType::F32 => self.floats(centre, spread),
            DType::BF16 => self.halves(spread),
            DType::Q4K => self.blocks(DType::Q4K, spread),
            DType::Q6K => self.blocks(DType::Q6K, spread),
            other => unreachable!("no shape here has {other} in its mix"),
        }
    }

    fn floats(&mut self, centre: f32, spread: f32) {
        for bytes in self.bytes.chunks_exact_mut(4) {
            let uniform = (self.random.next() as i32) as f32 / (1u32 << 31) as f32;
            bytes.copy_from_slice(&(centre + spread * uniform).to_le_bytes());
        }
    }

    fn halves(&mut self, spread: f32) {
        let step = spread / 32_768.0;
        for four in self.bytes.chunks_mut(8) {
            let draw = self.random.next();
            let value = |i: u32| f32::from((draw >> (16 * i)) as i16) * step;
            let half = |i: u32| u64::from(value(i).to_bits() >> 16) << (16 * i);
            let halves = half(0) | half(1) | half(2) | half(3);
            four.copy_from_slice(&halves.to_le_bytes()[..four.len()]);
        }
    }

    /// Random codes under scales that are all one.
    fn blocks(&mut self, dtype: DType, spread: f32) {
        for eight in self.bytes.chunks_mut(8) {
            let draw = self.random.next().to_le_bytes();
            eight.copy_from_slice(&draw[..eight.len()]);
        }
        let deviation = spread / 3f32.sqrt();
        let half = |x: f32| quant::quantize(DType::F16, &[x]).expect("a float has bytes");
        match dtype {
            // w = (8 d) code - (8 dmin), codes of 0..16 with a deviation of 4.61.
            DType::Q4K => {
                let d = deviation / 4.61 / 8.0;
                let head = [half(d), half(7.5 * d), vec![8; 8], vec![0x88; 4]].concat();
                self.bytes.chunks_exact_mut(144).for_each(|b| b[..16].copy_from_slice(&head));
            }
            // w = (4 d) (code - 32), codes of 0..64 with a deviation of 18.5.
            _ => {
                let tail = [vec![4; 16], half(deviation / 18.5 / 4.0)].concat();
                self.bytes.chunks_exact_mut(210).for_each(|b| b[192..].copy_from_slice(&tail));
            }
        }
    }
}

/// Splitmix64: a step and a mix.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u32 {
        (self.next() % end) as u32
    }
}
