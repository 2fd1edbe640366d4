//! The GPU's path against the reference, on the models of the other tests. It computes in bf16
//! where they compute in f32, so it is held to the error that rounding leaves, not to bits; what it
//! must not do is to depend on neighbours, on how a prompt was cut, or on replaying a recorded
//! pass, by more than that.
//!
//! Without a GPU each test says so and passes, unless `HEARTH_GPU` is set.

use hearth_kernels::lora::Float;
use hearth_kernels::sampling::{SamplingParams, Scratch, argmax, sample};
use hearth_models::config::RopeConfig;
use hearth_models::{LoraSlot, Pass, Pick, RowOutput, TokenEdit, Wanted};

use super::configs::configs;
use super::*;

/// Root mean square of the error over that of the logits, about twice what bf16 leaves in two
/// layers; quantised weights meet 8-bit activations too.
fn limit(weights: DType) -> f64 {
    match weights {
        DType::Q8_0 | DType::Q4_0 | DType::Q4K | DType::Q6K => 0.05,
        _ => 0.03,
    }
}

/// The same beside what the keys and values leave out.
fn limit_of(weights: DType, kv: KvDType) -> f64 {
    limit(weights).hypot(tolerance(weights, kv))
}

/// Every type that is stored there.
const STORED: [KvDType; 4] = [KvDType::F16, KvDType::BF16, KvDType::Q8_0, KvDType::Fp8];

fn gpu() -> Option<Compute> {
    match Compute::parse("cuda", &Arc::new(Pool::new(1))) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            assert!(std::env::var_os("HEARTH_GPU").is_none(), "{error}");
            println!("there is no GPU: {error}");
            None
        }
    }
}

fn assert_near(got: &[f32], want: &[f32], limit: f64, what: &str) {
    assert!(got.iter().all(|x| x.is_finite()), "{what}: not a number");
    let error = relative_error(got, want);
    println!("{what:<72} {error:.1e}");
    assert!(error <= limit, "{what}: {error} is beyond {limit}");
}

#[test]
fn every_knob() {
    let Some(gpu) = gpu() else { return };
    // Where experts are chosen a row on the border between two may go to the other: see `experts`.
    let certain = |config: &ModelConfig| config.experts.is_none_or(|of| of.used == of.count);
    for (name, config) in configs().into_iter().filter(|(_, config)| certain(config)) {
        let sequence = Sequence::new(tokens(45, 0), 3);
        let want = Bench::new(model(&config, DType::F32, &plain()), KvDType::F32)
            .prefill_and_decode(&sequence, 37);
        for kv in STORED {
            let got =
                Bench::new(model(&config, DType::F32, &gpu), kv).prefill_and_decode(&sequence, 37);
            assert_near(&got, &want, limit_of(DType::F32, kv), &format!("{name}, {kv:?}"));
        }
    }
}

/// Wide heads, as real models have them, and a context of several chunks and tiles.
#[test]
fn long_contexts() {
    let Some(gpu) = gpu() else { return };
    for (dim, kv_heads, window) in
        [(64, 2, None), (128, 2, None), (128, 8, Some(300)), (256, 4, None)]
    {
        let mut config = tiny::config();
        (config.head_dim, config.rope.dim, config.kv_head_count) = (dim, dim, kv_heads);
        config.windows = vec![window, None];
        config.knobs.qk_norm = dim == 128;
        let sequence = Sequence::new(tokens(700, dim), 1);
        let fused = fused(2);
        let want = Bench::new(model(&config, DType::F32, &fused), KvDType::F32)
            .prefill_and_decode(&sequence, 690);
        for kv in [KvDType::F16, KvDType::Q8_0, KvDType::Fp8] {
            let limit = limit_of(DType::F32, kv);
            let bench = || Bench::new(model(&config, DType::F32, &gpu), kv);
            let got = bench().prefill_and_decode(&sequence, 690);
            assert_near(&got, &want, limit, &format!("heads of {dim}, {kv:?}"));
            for chunk in [129, 256, 300] {
                let got = bench().chunked(&sequence, chunk);
                assert_near(&got, &want, limit, &format!("heads of {dim} by {chunk}, {kv:?}"));
            }
        }
    }
}

/// Both tables of rotations become larger under recorded passes, at position 4,096.
#[test]
fn tables_of_rotations_grow() {
    let Some(gpu) = gpu() else { return };
    let mut config = tiny::config();
    config.windows = vec![Some(40), None];
    config.local_rope = Some(RopeConfig { base: 100.0, ..config.rope.clone() });
    let sequence = Sequence::new(tokens(4101, 5), 0);
    let run = |compute: &Compute| {
        let mut bench = Bench::new(model(&config, DType::F32, compute), KvDType::F16);
        bench.rows(&sequence, 0..4091);
        (4091..4101).flat_map(|row| bench.rows(&sequence, row..row + 1)).collect::<Vec<f32>>()
    };
    let (got, want) = (run(&gpu), run(&fused(2)));
    assert_near(&got, &want, limit_of(DType::F32, KvDType::F16), "around position 4,096");
}

#[test]
fn every_weight_type() {
    let Some(gpu) = gpu() else { return };
    let sequence = Sequence::new(tokens(61, 1), 0);
    for weights in WEIGHTS {
        let want = Bench::new(model(&tiny::config(), weights, &plain()), KvDType::F32)
            .prefill_and_decode(&sequence, 50);
        let got = Bench::new(model(&tiny::config(), weights, &gpu), KvDType::F16)
            .prefill_and_decode(&sequence, 50);
        assert_near(&got, &want, limit(weights), weights.name());
    }
}

/// A prompt, then single rows, which are run, recorded and replayed while their experts change.
/// Where all experts are used the error is that of other models; else a row on the border between
/// two may go to the other, which is a large error of few rows.
#[test]
fn experts() {
    let Some(gpu) = gpu() else { return };
    let sequence = Sequence::new(tokens(61, 1), 0);
    for (used, of_chosen) in [(8, 1.0), (2, 6.0)] {
        let mut config = with_experts();
        config.experts = Some(Routing { count: 8, used, normalized: used == 2 });
        for weights in WEIGHTS {
            let want = Bench::new(model(&config, weights, &plain()), KvDType::F32)
                .prefill_and_decode(&sequence, 40);
            let got = Bench::new(model(&config, weights, &gpu), KvDType::F16)
                .prefill_and_decode(&sequence, 40);
            let what = format!("{used} of 8 experts, {}", weights.name());
            assert_near(&got, &want, of_chosen * limit(weights), &what);
        }
    }
}

#[test]
fn mixed_batches() {
    let Some(gpu) = gpu() else { return };
    for weights in [DType::BF16, DType::Q4K] {
        let mut bench = Bench::new(model(&tiny::config(), weights, &gpu), KvDType::F16);
        let mut first = 0;
        let mut batch = ForwardBatch::empty();
        let mut want = Vec::new();
        for (context, rows) in RAGGED {
            let sequence = Sequence::new(tokens(context + rows, first as usize), first);
            first += sequence.table.len() as u32;
            let mut alone = Bench::new(model(&tiny::config(), weights, &plain()), KvDType::F32);
            if context > 0 {
                alone.rows(&sequence, 0..context);
                bench.rows(&sequence, 0..context);
            }
            want.extend(alone.rows(&sequence, context..context + rows));
            sequence.push(&mut batch, context..context + rows);
        }
        assert_near(&bench.forward(&batch), &want, limit(weights), weights.name());
    }
}

/// Rows of several sequences, one step after the other: run, recorded, replayed, in one shape and
/// in several in turn, with sequences that come and go.
#[test]
fn replayed_passes() {
    let Some(gpu) = gpu() else { return };
    for dim in [32, 64] {
        let mut config = tiny::config();
        (config.head_dim, config.rope.dim) = (dim, dim);
        let sequences: Vec<_> =
            (0..5).map(|s| Sequence::new(tokens(64, s), 4 * s as u32 + 1)).collect();
        let whole: Vec<_> = sequences
            .iter()
            .map(|s| Bench::new(model(&config, DType::F32, &plain()), KvDType::F32).rows(s, 0..64))
            .collect();
        let mut bench = Bench::new(model(&config, DType::F32, &gpu), KvDType::F16);
        sequences.iter().for_each(|s| drop(bench.rows(s, 0..40)));
        for at in 40..64 {
            let mut batch = ForwardBatch::empty();
            let mut want = Vec::new();
            for s in (0..5).filter(|s| (s + at) % 4 != 0 || at < 48) {
                // A sequence that was left out reads again what it missed.
                let mut catch_up = ForwardBatch::empty();
                sequences[s].push(&mut catch_up, at - 3..at);
                bench.forward(&catch_up);
                sequences[s].push(&mut batch, at..at + 1);
                want.extend_from_slice(&whole[s][at * 512..(at + 1) * 512]);
            }
            let got = bench.forward(&batch);
            assert_near(&got, &want, limit(DType::F32), &format!("heads of {dim}, step {at}"));
        }
    }
}

#[test]
fn copied_blocks() {
    let Some(gpu) = gpu() else { return };
    for kv in STORED {
        let mut bench = Bench::new(model(&tiny::config(), DType::F32, &gpu), kv);
        let mut sequence = Sequence::new(tokens(33, 3), 0);
        let want = bench.rows(&sequence, 0..33)[32 * 512..].to_vec();
        bench.kv.copy_block(1, 9).unwrap();
        sequence.table[1] = 9;
        let got = bench.rows(&sequence, 32..33);
        assert_near(&got, &want, limit(DType::F32), &format!("a copied block, {kv:?}"));
    }
}

#[test]
fn adapters_beside_each_other() {
    let Some(gpu) = gpu() else { return };
    let config = tiny::config();
    let adapters: Vec<_> = [(8, Float::F32), (5, Float::BF16)]
        .into_iter()
        .enumerate()
        .map(|(i, (rank, float))| {
            Arc::new(tiny::adapter(&config, rank, float, 40 + i as u64).unwrap())
        })
        .collect();
    let run = |compute: &Compute, kv: KvDType| {
        let mut bench = Bench::new(model(&config, DType::F32, compute), kv);
        bench.model.put_adapters(LoraSlot(1), &[(Arc::clone(&adapters[0]), 1.0)]).unwrap();
        let both = [(Arc::clone(&adapters[0]), 0.5), (Arc::clone(&adapters[1]), 2.0)];
        bench.model.put_adapters(LoraSlot(2), &both).unwrap();
        let mut batch = ForwardBatch::empty();
        for (i, slot) in [Some(1), None, Some(2), Some(1)].into_iter().enumerate() {
            let sequence = Sequence::new(tokens(9 + i, i), 2 * i as u32);
            sequence.push(&mut batch, 0..9 + i);
            batch.run_last_with(slot.map(LoraSlot));
        }
        bench.forward(&batch)
    };
    let want = run(&plain(), KvDType::F32);
    assert_near(&run(&gpu, KvDType::F16), &want, limit(DType::F32), "four sequences");
}

/// Steps that are run, recorded and replayed with adapters; now and then others come under the same
/// number.
#[test]
fn recorded_adapters() {
    let Some(gpu) = gpu() else { return };
    let config = tiny::config();
    let adapter = |seed| Arc::new(tiny::adapter(&config, 8, Float::F32, seed).unwrap());
    let lists = [adapter(50), adapter(51)];
    let run = |compute: &Compute, kv: KvDType| {
        let mut bench = Bench::new(model(&config, DType::F32, compute), kv);
        let sequences: Vec<_> =
            (0..3).map(|s| Sequence::new(tokens(64, s), 4 * s as u32 + 1)).collect();
        sequences.iter().for_each(|s| drop(bench.rows(s, 0..10)));
        let mut all = Vec::new();
        for at in 10..34 {
            if at % 6 == 4 {
                bench.model.drop_adapters(LoraSlot(1));
                let list = [(Arc::clone(&lists[at / 6 % 2]), 1.0)];
                bench.model.put_adapters(LoraSlot(1), &list).unwrap();
            }
            let mut batch = ForwardBatch::empty();
            for (i, sequence) in sequences.iter().enumerate() {
                sequence.push(&mut batch, at..at + 1);
                batch.run_last_with((i != 1).then_some(LoraSlot(1)));
            }
            all.extend(bench.forward(&batch));
        }
        all
    };
    let want = run(&plain(), KvDType::F32);
    assert_near(&run(&gpu, KvDType::F16), &want, limit(DType::F32), "steps with adapters");
}

/// What becomes of a row with or without a pick.
fn wanted(pick: Option<Pick>) -> Wanted {
    pick.map_or(Wanted::Logits, Wanted::Token)
}

/// Lays a mask over a row.
fn forbid(row: &mut [f32], mask: Option<&[u32]>) {
    let Some(mask) = mask else { return };
    for (id, logit) in row.iter_mut().enumerate() {
        if mask.get(id / 32).is_none_or(|word| word >> (id % 32) & 1 == 0) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Rows that stay on the device are what they were when passes later, recorded ones too, a token is
/// chosen from them.
#[test]
fn kept_rows() {
    let Some(gpu) = gpu() else { return };
    let mut bench = Bench::new(model(&tiny::config(), DType::F32, &gpu), KvDType::F16);
    let sequences: Vec<_> = (0..3).map(|s| Sequence::new(tokens(40, s), 4 * s as u32)).collect();
    sequences.iter().for_each(|s| drop(bench.rows(s, 0..20)));
    let params = SamplingParams { temperature: 0.7, ..SamplingParams::default() };
    let pick = |position: usize, mask| {
        let (edits, position) = (Vec::new(), position as u64);
        Pick { params, edits, seed: 3, position, vocab_len: 500, mask }
    };
    let mask = vec![0x1234_5678; 16];
    let (mut waiting, mut different) = (Vec::new(), 0);
    for at in 20..40 {
        let mut batch = ForwardBatch::empty();
        sequences.iter().for_each(|s| s.push(&mut batch, at..at + 1));
        let logits = bench.forward(&batch);
        let wanted = [Wanted::Token(pick(at, None)), Wanted::Kept, Wanted::Logits];
        let mut pass = bench.model.launch(&batch, &mut bench.kv, &mut || wanted.to_vec()).unwrap();
        let kept = pass.take_kept();
        assert_eq!(kept.iter().map(|(row, _)| *row).collect::<Vec<_>>(), [1]);
        waiting.extend(kept.into_iter().map(|(_, kept)| (at, kept, logits[512..1024].to_vec())));
        if at % 4 == 3 {
            for (at, kept, mut own) in waiting.drain(..) {
                own.truncate(500);
                forbid(&mut own, Some(&mask));
                let want = sample(&own, &params, 3, at as u64, &mut Scratch::new());
                let late = kept.choose(pick(at, Some(mask.clone()))).unwrap().wait().unwrap();
                let got = late.row(0, 512);
                different += usize::from(got != RowOutput::Chosen(want));
            }
        }
        let output = pass.wait().unwrap();
        assert!(matches!(output.row(0, 512), RowOutput::Chosen(Some(_))));
        assert_eq!(output.row(1, 512), RowOutput::Kept);
        match output.row(2, 512) {
            RowOutput::Logits(got) => assert_near(got, &logits[1024..], 1e-6, "read out beside"),
            other => panic!("{other:?}"),
        }
    }
    assert!(waiting.is_empty() && different <= 1, "{different} of 20 tokens differ");
}

/// What the device chooses is what the host would choose from the logits that the device has.
#[test]
fn chosen_tokens() {
    let Some(gpu) = gpu() else { return };
    let mut bench = Bench::new(model(&tiny::config(), DType::F32, &gpu), KvDType::F16);
    let sequences: Vec<_> = (0..4).map(|s| Sequence::new(tokens(40, s), 4 * s as u32)).collect();
    sequences.iter().for_each(|s| drop(bench.rows(s, 0..20)));
    let params = [
        Some(SamplingParams { temperature: 0.0, ..SamplingParams::default() }),
        Some(SamplingParams { temperature: 0.8, top_p: 0.9, ..SamplingParams::default() }),
        None,
        Some(SamplingParams { top_k: 20, min_p: 0.02, ..SamplingParams::default() }),
    ];
    let edit = |token: u32| TokenEdit {
        token,
        divide: 1.0 + token as f32 / 300.0,
        subtract: 0.25,
        add: if token.is_multiple_of(5) { f32::NEG_INFINITY } else { 0.5 },
    };
    let edits: Vec<TokenEdit> = (0..400).step_by(3).map(edit).collect();
    let mut different = 0;
    for at in 20..40 {
        let mut batch = ForwardBatch::empty();
        sequences.iter().for_each(|s| s.push(&mut batch, at..at + 1));
        let logits = bench.forward(&batch);
        let picks: Vec<Option<Pick>> = params
            .iter()
            .map(|p| {
                let (position, edits) = (at as u64, edits.clone());
                let mask = at.is_multiple_of(3).then(|| vec![0x5a3c_0ff1; 15]);
                p.map(|params| Pick { params, edits, seed: 9, position, vocab_len: 500, mask })
            })
            .collect();
        let wanted: Vec<Wanted> = picks.iter().cloned().map(wanted).collect();
        let output = bench.model.step(&batch, &mut bench.kv, &wanted).unwrap();
        for (row, pick) in picks.iter().enumerate() {
            let own = &logits[row * 512..(row + 1) * 512];
            match (output.row(row, 512), pick) {
                (RowOutput::Logits(got), None) => assert_near(got, own, 1e-6, "not chosen from"),
                (RowOutput::Chosen(id), Some(pick)) => {
                    let (mut own, mut scratch) = (own[..500].to_vec(), Scratch::new());
                    for edit in &edits {
                        let x = &mut own[edit.token as usize];
                        *x = if *x > 0.0 { *x / edit.divide } else { *x * edit.divide };
                        *x = *x - edit.subtract + edit.add;
                    }
                    forbid(&mut own, pick.mask.as_deref());
                    let want = match pick.params.temperature > 0.0 {
                        true => sample(&own, &pick.params, 9, at as u64, &mut scratch),
                        false => argmax(&own),
                    };
                    different += usize::from(id != want);
                }
                other => panic!("row {row}: {other:?}"),
            }
        }
    }
    assert!(different <= 1, "{different} of 60 tokens differ");
}

/// A pass that is asked for while the one before it is under way reads the tokens that that one
/// chooses: it is the pass that is asked for when they are known. Beside them stands a row whose
/// logits are read out.
#[test]
fn passes_ahead() {
    let Some(gpu) = gpu() else { return };
    let sequences: Vec<_> = (0..3).map(|s| Sequence::new(tokens(40, s), 4 * s as u32)).collect();
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let params = [Some(greedy), Some(SamplingParams::default()), None];
    let run = |ahead: bool| {
        let mut bench = Bench::new(model(&tiny::config(), DType::F32, &gpu), KvDType::F16);
        sequences.iter().for_each(|s| drop(bench.rows(s, 0..20)));
        let (mut newest, mut said, mut logits) = ([1, 2], Vec::new(), Vec::new());
        let mut land = |pass: Pass| {
            let output = pass.wait().unwrap();
            let tokens = [0, 1].map(|row| match output.row(row, 512) {
                RowOutput::Chosen(Some(id)) => id,
                other => panic!("row {row}: {other:?}"),
            });
            said.push(tokens);
            logits.extend(output.into_logits());
            tokens
        };
        let mut under_way: Option<Pass> = None;
        for at in 20..40 {
            let known = under_way.is_none();
            let mut batch = ForwardBatch::empty();
            for (s, sequence) in sequences.iter().enumerate() {
                let token = newest.get(s).copied().unwrap_or(sequence.ids[at]);
                let token = if known || s == 2 { token } else { 0 };
                batch.push(&[token], at, sequence.table.clone(), BLOCK_LEN);
                batch.logit_rows.push(s as u32);
                if !known && s < 2 {
                    batch.chosen.push((s as u32, s as u32));
                }
            }
            let pick = |params: Option<SamplingParams>| {
                let (edits, position) = (Vec::new(), at as u64);
                let mask = None;
                params.map(|params| Pick { params, edits, seed: 9, position, vocab_len: 500, mask })
            };
            let wanted: Vec<Wanted> = params.map(pick).into_iter().map(wanted).collect();
            let mut wanted = || wanted.clone();
            let pass = bench.model.launch(&batch, &mut bench.kv, &mut wanted).unwrap();
            match ahead {
                false => newest = land(pass),
                true => drop(under_way.replace(pass).map(&mut land)),
            }
        }
        under_way.map(&mut land);
        (said, logits)
    };
    let (in_turn, ahead) = (run(false), run(true));
    assert_eq!(in_turn.0, ahead.0);
    assert_near(&ahead.1, &in_turn.1, 1e-6, "read out beside them");
}

/// Two GPUs, each with a part of every layer; `HEARTH_GPUS=2` makes it a failure that one is not
/// there.
#[cfg(feature = "nccl")]
fn two_gpus() -> Option<Compute> {
    match gpu()?.divided(2) {
        Ok(gpus) => Some(gpus),
        Err(error) => {
            assert!(std::env::var_os("HEARTH_GPUS").is_none(), "{error}");
            println!("there is no second GPU: {error}");
            None
        }
    }
}

#[cfg(feature = "nccl")]
#[test]
fn divided_every_knob() {
    let Some(gpus) = two_gpus() else { return };
    let divides = |c: &ModelConfig| c.experts.is_none() && c.kv_head_count.is_multiple_of(2);
    for (name, config) in configs().into_iter().filter(|(_, c)| divides(c)) {
        let sequence = Sequence::new(tokens(45, 0), 3);
        let want = Bench::new(model(&config, DType::F32, &plain()), KvDType::F32)
            .prefill_and_decode(&sequence, 37);
        let got = Bench::new(model(&config, DType::F32, &gpus), KvDType::F16)
            .prefill_and_decode(&sequence, 37);
        assert_near(&got, &want, limit(DType::F32), &format!("{name}, divided"));
    }
}

#[cfg(feature = "nccl")]
#[test]
fn divided_every_weight_type() {
    let Some(gpus) = two_gpus() else { return };
    // Half of what `out` and `down` read are blocks of 256.
    let mut config = tiny::config();
    (config.head_dim, config.rope.dim) = (64, 64);
    let sequence = Sequence::new(tokens(61, 1), 0);
    for weights in WEIGHTS {
        let want = Bench::new(model(&config, weights, &plain()), KvDType::F32)
            .prefill_and_decode(&sequence, 50);
        let got = Bench::new(model(&config, weights, &gpus), KvDType::F16)
            .prefill_and_decode(&sequence, 50);
        assert_near(&got, &want, limit(weights), &format!("{weights}, divided"));
    }
}
