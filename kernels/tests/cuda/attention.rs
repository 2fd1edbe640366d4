//! Rotation, storage and attention through a step, against the CPU's.

use hearth_kernels::cuda::{Gpu, KvKind, StepShape};

use crate::report::{Report, Tolerance, on_gpu};
use crate::world::{Heads, World};

/// Queries and keys are rounded where the device rounds them; left are the output, rounded to bf16,
/// and the weights, rounded to the type of the store.
const BF16: Tolerance = Tolerance { norm: 4e-3, each: 3e-2 };
const F16: Tolerance = Tolerance { norm: 3e-3, each: 2e-2 };
/// Weights are rounded to bf16. A key or value on the border between two bytes may go the other way
/// than the CPU's, which is a 127th of a head's largest number, or a 16th of the number.
const Q8: Tolerance = Tolerance { norm: 5e-3, each: 4e-2 };
const FP8: Tolerance = Tolerance { norm: 5e-3, each: 8e-2 };

/// Both sides are rounded to bf16; a few numbers on the border between two go the other way.
const TURNED: Tolerance = Tolerance { norm: 1e-3, each: 9e-3 };

fn tolerance(heads: &Heads) -> Tolerance {
    match heads.kind {
        KvKind::BF16 => BF16,
        KvKind::F16 => F16,
        KvKind::Q8 => Q8,
        KvKind::Fp8 => FP8,
    }
}

/// Query heads and heads of the store: groups of 1, 2, 3, 4, 7, 8, and more than one block has.
const GROUPS: &[[usize; 2]] = &[[2, 2], [4, 2], [3, 1], [8, 2], [14, 2], [16, 2], [12, 1], [9, 1]];
/// Width, what turns of it, and heads: without tensor cores, and the widest with them.
const OTHERS: &[[usize; 4]] = &[
    [16, 16, 2, 2],
    [32, 16, 6, 2],
    [80, 80, 4, 1],
    [80, 22, 3, 3],
    [96, 48, 7, 1],
    [256, 256, 4, 2],
    [256, 64, 8, 1],
    [256, 256, 4, 1],
    [256, 256, 3, 3],
];

/// None, one that bends most scores, one that bends few.
const SOFTCAPS: [Option<f32>; 3] = [None, Some(1.5), Some(50.0)];

/// None, between the scores, far above all, far below.
const SINKS: [Option<f32>; 4] = [None, Some(0.0), Some(20.0), Some(-20.0)];

/// All kinds of heads, every `step`-th group.
fn all(step: usize) -> Vec<Heads> {
    let mut all = Vec::new();
    for kind in [KvKind::BF16, KvKind::F16, KvKind::Q8, KvKind::Fp8] {
        for dim in [64, 128] {
            for (i, &[heads, kv_heads]) in GROUPS.iter().enumerate().step_by(step) {
                let rot = [dim, dim / 2, dim, 20][i / step % 4];
                let norms = (i / step).is_multiple_of(2);
                let (softcap, sinks) = (SOFTCAPS[i / step % 3], SINKS[(i / step + dim / 64) % 4]);
                all.push(Heads { dim, heads, kv_heads, rot, norms, softcap, sinks, kind });
            }
        }
        for (i, &[dim, rot, heads, kv_heads]) in OTHERS.iter().enumerate() {
            let (norms, softcap, sinks) = (i % 2 == 0, SOFTCAPS[i % 3], SINKS[i % 4]);
            all.push(Heads { dim, heads, kv_heads, rot, norms, softcap, sinks, kind });
        }
    }
    all
}

fn exact(shape: StepShape) -> StepShape {
    shape
}

fn world(gpu: &Gpu, report: &mut Report, heads: Heads, lens: &[usize]) -> Option<World> {
    report.ask(&format!("{heads:?}"), || World::new(gpu, heads, lens))
}

/// Queries come out turned: every width, norm and partial rotation.
#[test]
fn queries_are_turned() {
    on_gpu("rope", |gpu, report| {
        for heads in all(1) {
            let Some(mut world) = world(gpu, report, heads, &[33, 20]) else { continue };
            for parts in [&[(0, 13), (1, 1)][..], &[(0, 20), (1, 18)]] {
                let batch = world.batch(parts);
                let want = world.queries(&batch).to_vec();
                report.near(&format!("{heads:?} {parts:?}"), TURNED, &want, || {
                    world.run(gpu, &batch, exact, None)
                });
            }
        }
    });
}

/// Single rows at the end of contexts of every length around blocks and chunks.
#[test]
fn decode() {
    const CONTEXTS: [usize; 8] = [1, 15, 16, 17, 255, 256, 257, 600];
    on_gpu("decode", |gpu, report| {
        for heads in all(1) {
            let Some(mut world) = world(gpu, report, heads, &CONTEXTS) else { continue };
            let before: Vec<_> = CONTEXTS.iter().map(|len| len - 1).enumerate().collect();
            let before = world.batch(&before[1..]);
            report.ask("store", || world.run(gpu, &before, exact, None));
            let items: Vec<_> = (0..CONTEXTS.len()).map(|seq| (seq, 1)).collect();
            let batch = world.batch(&items);
            for window in [0, 1, 20, 256, 300] {
                let want = world.truth(&batch, window);
                let width = heads.heads * heads.dim;
                let run = || world.run(gpu, &batch, exact, Some(window));
                let Some(got) = report.ask(&format!("{heads:?}"), run) else { continue };
                for (i, context) in CONTEXTS.iter().enumerate() {
                    let case = format!("{heads:?} context {context} window {window}");
                    let (got, want) = (&got[i * width..][..width], &want[i * width..][..width]);
                    report.near(&case, tolerance(&heads), want, || Ok(got.to_vec()));
                }
            }
        }
    });
}

/// Prompts in chunks beside single rows of others, all in one step.
#[test]
fn mixed_batches() {
    const STEPS: &[&[(usize, usize)]] = &[
        &[(0, 300), (1, 1), (2, 17)],
        &[(2, 256), (0, 1), (1, 15)],
        &[(1, 1), (0, 127), (2, 1)],
        &[(0, 129), (1, 128), (2, 2)],
        &[(1, 1), (2, 1), (0, 1)],
        &[(0, 42), (2, 64)],
        &[(2, 8), (1, 5)],
        &[(2, 9), (1, 3)],
    ];
    on_gpu("mixed batches", |gpu, report| {
        for heads in all(2) {
            let Some(mut world) = world(gpu, report, heads, &[600, 200, 400]) else { continue };
            for (i, parts) in STEPS.iter().enumerate() {
                let batch = world.batch(parts);
                for window in [0, [1, 20, 64, 300][i % 4]] {
                    let want = world.truth(&batch, window);
                    let case = format!("{heads:?} step {i} {parts:?} window {window}");
                    report.near(&case, tolerance(&heads), &want, || {
                        world.run(gpu, &batch, exact, Some(window))
                    });
                }
            }
        }
    });
}

/// A shape that is larger than its batch changes no bit, and stores nothing.
#[test]
fn padding_changes_nothing() {
    type Pad = fn(StepShape) -> StepShape;
    const PADS: &[Pad] = &[
        |s| StepShape { rows: s.rows + 5, ..s },
        |s| StepShape { rows: s.rows + 3, items: s.items + 3, ..s },
        |s| StepShape { tiles: s.tiles + 2, ..s },
        |s| StepShape { chunks: s.chunks + 3, items: s.items + 1, ..s },
        |s| StepShape {
            rows: s.rows + 11,
            logits: s.logits + 4,
            items: s.items + 4,
            tiles: s.tiles + 1,
            chunks: 4,
        },
        // More parts than have room at once.
        |s| StepShape { rows: s.rows + 60, items: s.items + 60, chunks: 1 << 12, ..s },
    ];
    on_gpu("padding", |gpu, report| {
        for heads in all(4) {
            let Some(mut world) = world(gpu, report, heads, &[400, 300, 40]) else { continue };
            for parts in [&[(0, 270), (1, 140), (2, 1)][..], &[(0, 1), (1, 1), (2, 1)]] {
                let batch = world.batch(parts);
                let want = world.truth(&batch, 0);
                let run = || world.run(gpu, &batch, exact, Some(0));
                let Some(own) = report.ask(&format!("{heads:?}"), run) else { continue };
                for (i, pad) in PADS.iter().enumerate() {
                    let case = format!("{heads:?} {parts:?} padding {i}");
                    report.same(&case, &own, || world.run(gpu, &batch, pad, Some(0)));
                }
                report.near(&format!("{heads:?} {parts:?}"), tolerance(&heads), &want, || Ok(own));
            }
        }
    });
}

/// A row has the same bits alone and in company, and however its prompt was cut.
#[test]
fn company_and_cuts_change_no_bit() {
    on_gpu("company", |gpu, report| {
        for heads in all(4) {
            let Some(mut world) = world(gpu, report, heads, &[300, 300, 290]) else { continue };
            let whole = world.batch(&[(0, 300), (1, 280), (2, 260)]);
            let run = || world.run(gpu, &whole, exact, Some(0));
            let Some(whole_out) = report.ask(&format!("{heads:?}"), run) else { continue };
            // The last rows once more, from another place of the prompt, with what is stored.
            let width = heads.heads * heads.dim;
            for rows in [9, 37, 129, 170] {
                let alone = whole.last_rows(0, rows, &heads);
                let want = &whole_out[(300 - rows) * width..300 * width];
                let case = format!("{heads:?} the last {rows} rows");
                report.same(&case, want, || world.run(gpu, &alone, exact, Some(0)));
            }
            // Few rows of one sequence are as good as single ones.
            let items = world.batch(&[(1, 5), (2, 1)]);
            let run = || world.run(gpu, &items, exact, Some(0));
            let Some(all) = report.ask(&format!("{heads:?}"), run) else { continue };
            for (part, rows, end) in [(0, 1, 5), (0, 3, 5), (1, 1, 6)] {
                let alone = items.last_rows(part, rows, &heads);
                let case = format!("{heads:?} part {part}, {rows} rows alone");
                let want = &all[(end - rows) * width..end * width];
                report.same(&case, want, || world.run(gpu, &alone, exact, Some(0)));
            }
        }
    });
}

/// A sequence goes on in copies of the blocks of another.
#[test]
fn blocks_are_copied() {
    on_gpu("copy_block", |gpu, report| {
        for heads in all(4) {
            let Some(mut world) = world(gpu, report, heads, &[64, 16]) else { continue };
            let batch = world.batch(&[(0, 40)]);
            report.ask("store", || world.run(gpu, &batch, exact, None));
            let shared = world.seqs[0].0.clone();
            let copy = report.ask("copy", || world.copy_block(gpu, shared[2]));
            let Some(copy) = copy else { continue };
            world.seqs[1] = (vec![shared[0], shared[1], copy], 40);
            for parts in [&[(0, 1), (1, 1)][..], &[(1, 3), (0, 5)]] {
                let batch = world.batch(parts);
                let want = world.truth(&batch, 0);
                report.near(&format!("{heads:?} {parts:?}"), tolerance(&heads), &want, || {
                    world.run(gpu, &batch, exact, Some(0))
                });
            }
        }
    });
}
