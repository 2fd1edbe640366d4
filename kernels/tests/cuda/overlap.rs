//! Kernels begin while those before them end; none may use what is not written yet.

use hearth_kernels::cases::randoms;
use hearth_kernels::cuda::{Float, Gpu, Matrix, Result, Rows, Vector};

use crate::blocks::{Weights, formats};
use crate::report::on_gpu;

const WIDTH: usize = 8192;
const OUTPUTS: usize = 80;
/// Products that are asked for at once.
const ROUNDS: u64 = 12;

/// The product of rows that the kernel before it makes; `waits` for that one.
fn ask(gpu: &Gpu, w: &Matrix, gain: &Vector, x: &[f32], m: usize, waits: bool) -> Result<Rows> {
    let x = gpu.rows_from(x, m, Float::F32)?;
    let x = gpu.rms_norm(&x, gain, 1e-6)?;
    if waits {
        gpu.synchronize()?;
    }
    let [y] = gpu.linear(&x, [(w, None)])?;
    Ok(y)
}

/// Inputs follow each other in the same memory, so one that is read too early is another one.
#[test]
fn products_wait_for_their_input() {
    on_gpu("overlap", |gpu, report| {
        let Some(overlaps) = report.ask("overlap", || gpu.overlaps()) else { return };
        println!("kernels overlap: {overlaps}");
        let gain = report.ask("norm", || gpu.vector(&[1.0; WIDTH]));
        let Some(gain) = gain else { return };
        for dtype in formats() {
            let w = Weights::new(dtype, [OUTPUTS, WIDTH], 5);
            let Some(w) = report.ask("weights", || w.upload(gpu)) else { continue };
            for m in [1, 8, 9, 16, 24, 32, 33, 64, 100] {
                let inputs: Vec<_> = (0..ROUNDS).map(|i| randoms(m * WIDTH, 60 + i)).collect();
                let all = |waits: bool| -> Result<Vec<Vec<f32>>> {
                    let asked = inputs.iter().map(|x| ask(gpu, &w, &gain, x, m, waits));
                    let asked = asked.collect::<Result<Vec<_>>>()?;
                    asked.into_iter().map(|y| gpu.read(y)).collect()
                };
                let Some(got) = report.ask("at once", || all(false)) else { return };
                let Some(want) = report.ask("in turn", || all(true)) else { return };
                for (i, (got, want)) in got.into_iter().zip(&want).enumerate() {
                    report.same(&format!("{dtype}, {m} rows, round {i}"), want, || Ok(got));
                }
            }
        }
    });
}
