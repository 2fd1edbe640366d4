//! Blocks that are copied, leave and come back, in every type.

use hearth_kernels::Pool;

use super::*;

#[test]
fn a_copied_block_holds_the_same_tokens() {
    let shape = KvShape { n_blocks: 3, block_len: 32, n_kv_heads: 2, head_dim: 5 };
    let row = |token: u32| [token as f32; 10];
    for kv_type in KvDType::ALL {
        let mut store = KvStore::Slabs(vec![KvSlab::new(shape, kv_type)], Arc::new(Pool::new(1)));
        let KvStore::Slabs(slabs, _) = &mut store else { unreachable!() };
        let pool = Pool::new(1);
        (0..64).for_each(|slot| slabs[0].write(&pool, &row(slot), &row(slot + 100), &[slot]));
        store.copy_block(1, 2).unwrap();
        let KvStore::Slabs(slabs, _) = &store else { unreachable!() };
        for slot in 32..64 {
            let (mut k, mut v) = (row(0), row(0));
            slabs[0].read(slot + 32, &mut k, &mut v);
            let off = match kv_type {
                KvDType::Fp8 => 1.0 / 16.0,
                KvDType::Q16_0 => 1e-4,
                _ => 1e-6,
            };
            let near = |got: [f32; 10], want: u32| {
                got.iter().all(|x| (x - want as f32).abs() <= off * want as f32)
            };
            assert!(near(k, slot) && near(v, slot + 100), "{kv_type:?}: {k:?} {v:?}");
        }
    }
    let geometry = KvGeometry {
        layer_count: 1,
        block_count: 3,
        block_len: 4,
        kv_head_count: 1,
        head_dim: 2,
        dtype: KvDType::F32,
    };
    let mut tensors = TensorKv::new(geometry, &Device::Cpu).unwrap();
    let rows = Tensor::arange(0f32, 8.0, &Device::Cpu).unwrap().reshape((4, 2)).unwrap();
    tensors.layers[0].0.slice_set(&rows, 0, 4).unwrap();
    tensors.copy_block(1, 2).unwrap();
    let copied = tensors.layers[0].0.narrow(0, 8, 4).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(copied, rows.to_vec2::<f32>().unwrap());
}

/// A block that leaves one store enters another of the same layout bit by bit, and no other.
#[test]
fn a_block_comes_back_as_it_left() {
    let geometry = |dtype, layer_count| KvGeometry {
        layer_count,
        block_count: 3,
        block_len: 16,
        kv_head_count: 2,
        head_dim: 5,
        dtype,
    };
    let tensors = |g| KvStore::Tensors(TensorKv::new(g, &Device::Cpu).unwrap());
    let slabs = |g: KvGeometry| {
        let slab = |_| KvSlab::new(g.slab_shape(), g.dtype);
        KvStore::Slabs((0..g.layer_count).map(slab).collect(), Arc::new(Pool::new(2)))
    };
    let mut layouts = Vec::new();
    for dtype in KvDType::ALL {
        let stores: [&dyn Fn(KvGeometry) -> KvStore; 2] = [&tensors, &slabs];
        for make in stores {
            let [mut from, mut to] = [(); 2].map(|()| make(geometry(dtype, 2)));
            let pattern: Vec<u8> = (0..from.block_bytes()).map(|i| (i % 59) as u8).collect();
            from.import_block(1, &pattern).unwrap();
            from.copy_block(1, 2).unwrap();
            while to.provide(2) {}
            to.prefault();
            let (mut left, mut came, mut blank) = (Vec::new(), Vec::new(), Vec::new());
            from.export_block(2, &mut left).unwrap();
            assert_eq!(left, pattern, "{dtype:?}");
            to.import_block(0, &left).unwrap();
            to.export_block(0, &mut came).unwrap();
            assert_eq!(came, pattern, "{dtype:?}");
            to.export_block(1, &mut blank).unwrap();
            assert!(blank.iter().all(|b| *b == 0), "a neighbour has changed");
            assert!(to.import_block(0, &left[1..]).is_err());
            layouts.extend([from.layout().unwrap(), make(geometry(dtype, 3)).layout().unwrap()]);
        }
    }
    let count = layouts.len();
    layouts.sort();
    layouts.dedup();
    assert_eq!(layouts.len(), count, "{layouts:?}");
    assert!(KvStore::Nothing.export_block(0, &mut Vec::new()).is_err());
}

/// What the fused path's slab does with numbers that its type cannot hold.
#[test]
fn tensors_narrow_as_slabs_do() {
    let row = [1e9f32, -1e9, f32::MAX, f32::NAN, f32::INFINITY, 0.1, -0.0, 65_504.0];
    let shape = KvShape { n_blocks: 1, block_len: 16, n_kv_heads: 2, head_dim: 4 };
    let calm = [0.3f32, -0.7, 1e-31, 0.004, 0.35, -0.0, 0.7, 0.69];
    for (ours, row) in KvDType::ALL.into_iter().flat_map(|t| [(t, row), (t, calm)]) {
        let (mut k, mut v) = ([0.0; 8], [0.0; 8]);
        let mut slab = KvSlab::new(shape, ours);
        slab.write(&hearth_kernels::Pool::new(1), &row, &row, &[3]);
        slab.read(3, &mut k, &mut v);
        let candles = stored_as(ours, true).unwrap();
        let stored = Tensor::zeros((16, row.len()), candles, &Device::Cpu).unwrap();
        let head_dim = shape.head_dim;
        let store = LayerKv { k: &stored, v: &stored, dtype: ours, head_dim, block_len: 16 };
        let rows = Tensor::new(&[row], &Device::Cpu).unwrap();
        let got = store.narrow(&rows, &rows).unwrap();
        for (got, want) in [(got.0, &k), (got.1, &v)] {
            let got = got.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            let got = got.to_vec1::<f32>().unwrap();
            let same = got.iter().zip(want).all(|(a, b)| a == b || a.is_nan() && b.is_nan());
            assert!(same, "{ours:?}: {got:?}, the slab has {want:?}");
        }
    }
}

#[test]
fn what_is_no_tensor_is_refused_where_it_would_be_one() {
    for dtype in KvDType::ALL {
        let refused = stored_as(dtype, false).err().map(|e| e.to_string());
        assert_eq!(refused.is_some(), in_slabs_alone(dtype), "{dtype:?}");
        assert!(refused.is_none_or(|e| e.contains(dtype.name()) && e.contains("f16")));
    }
}
