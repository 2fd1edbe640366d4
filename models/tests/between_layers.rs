//! A pass that stands still between two layers, and another one that is computed there: both give,
//! bit by bit, what they give alone.

use std::sync::Arc;

use candle_core::{DType as Float, Device};
use hearth_kernels::quant::DType;
use hearth_models::{Compute, ForwardBatch, KvDType, KvStore, LoraSlot, Model, Pool, Walk, tiny};

const BLOCK_LEN: usize = 16;

fn models() -> [Box<dyn Model>; 2] {
    let plain = Compute::Plain(Device::Cpu, Float::F32);
    let fused = Compute::Fused(Arc::new(Pool::new(2)));
    [plain, fused].map(|compute| tiny::load(&tiny::config(), DType::Q4_0, 7, &compute).unwrap())
}

fn store(model: &dyn Model) -> KvStore {
    model.kv_store(model.config().kv_geometry(8, BLOCK_LEN, KvDType::F16)).unwrap()
}

fn ids(count: u32, salt: u32) -> Vec<u32> {
    (0..count).map(|i| (i * i * 31 + i * 17 + salt) % 512).collect()
}

/// What is left of a pass.
fn end(model: &dyn Model, walk: &mut Walk, kv: &mut KvStore) -> Vec<f32> {
    loop {
        if let Some(pass) = model.go_on(walk, kv).unwrap() {
            return pass.wait().unwrap().into_logits();
        }
    }
}

fn bits(logits: Vec<f32>) -> Vec<u32> {
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_pass_between_two_layers_of_another_changes_neither() {
    for mut model in models() {
        let adapter = tiny::adapter(&tiny::config(), 4, hearth_kernels::lora::Float::F32, 3);
        model.put_adapters(LoraSlot(1), &[(Arc::new(adapter.unwrap()), 1.0)]).unwrap();
        let model = &*model;
        let waits = ForwardBatch::whole(&ids(40, 1), 0, BLOCK_LEN);
        let mut apart = ForwardBatch::whole(&ids(23, 2), 4, BLOCK_LEN);
        (apart.logit_rows, apart.lora_slot) = (vec![22], vec![Some(LoraSlot(1))]);
        let alone = [&waits, &apart].map(|b| bits(model.forward(b, &mut store(model)).unwrap()));
        for stop in 0..=model.config().layer_count {
            let kv = &mut store(model);
            let mut outer = model.walk(&waits, kv).unwrap().expect("it stops");
            (0..stop).for_each(|_| assert!(model.go_on(&mut outer, kv).unwrap().is_none()));
            let mut inner = model.walk(&apart, kv).unwrap().expect("it stops");
            assert_eq!(bits(end(model, &mut inner, kv)), alone[1], "before layer {stop}");
            assert!(model.go_on(&mut inner, kv).is_err(), "it has ended");
            assert_eq!(bits(end(model, &mut outer, kv)), alone[0], "stood before layer {stop}");
        }
    }
}

#[test]
fn keys_and_values_are_there_where_no_logits_are_wanted() {
    for model in models() {
        let model = &*model;
        let (mut silent, mut last) = (ForwardBatch::empty(), ForwardBatch::empty());
        let ids = ids(40, 1);
        silent.push(&ids[..39], 0, vec![0, 1, 2], BLOCK_LEN);
        last.push(&ids[39..], 39, vec![0, 1, 2], BLOCK_LEN);
        last.logit_rows = vec![0];
        let (one, other) = (&mut store(model), &mut store(model));
        assert!(model.forward(&silent, one).unwrap().is_empty());
        let mut walk = model.walk(&silent, other).unwrap().expect("it stops");
        assert!(end(model, &mut walk, other).is_empty());
        let [got, want] = [other, one].map(|kv| bits(model.forward(&last, kv).unwrap()));
        assert_eq!(got, want);
    }
}

#[test]
fn a_walk_of_another_kind_of_model_is_refused() {
    let [plain, fused] = models();
    let batch = ForwardBatch::whole(&ids(3, 1), 0, BLOCK_LEN);
    let mut walk = plain.walk(&batch, &mut store(&*plain)).unwrap().expect("it stops");
    let error = fused.go_on(&mut walk, &mut store(&*fused)).map(drop).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
    let unknown = ForwardBatch { lora_slot: vec![Some(LoraSlot(9))], ..batch.clone() };
    assert!(fused.walk(&unknown, &mut store(&*fused)).is_err());
    let chosen = ForwardBatch { chosen: vec![(0, 0)], ..batch };
    assert!(fused.walk(&chosen, &mut store(&*fused)).is_err());
}
