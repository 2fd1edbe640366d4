//! Sums over devices. One device is a sum of one part; a second one is used where it is there, and
//! `HEARTH_GPUS=2` makes it a failure that it is not.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hearth_kernels::cuda::{Communicators, Float, Gpu, Result, describe};

use crate::report::on_gpu;

/// What each device has at the end, in the order of the ranks.
fn sums(gpus: &[Arc<Gpu>], all: &Communicators, float: Float, round: usize) -> Vec<Vec<f32>> {
    let sum = |rank: usize| -> Result<Vec<f32>> {
        // Small integers, so that bf16 holds every sum.
        let values: Vec<f32> = (0..3 * 40).map(|i| ((i + round + 7 * rank) % 60) as f32).collect();
        let x = gpus[rank].rows_from(&values, 3, float)?;
        gpus[rank].read(all.sum(rank, x)?)
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..gpus.len()).map(|rank| scope.spawn(move || sum(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
    })
}

fn check(gpus: &[Arc<Gpu>]) -> Result<()> {
    let all = Communicators::new(gpus.to_vec())?;
    let want = |round: usize| -> Vec<f32> {
        let one = |i: usize, rank: usize| ((i + round + 7 * rank) % 60) as f32;
        (0..3 * 40).map(|i| (0..gpus.len()).map(|rank| one(i, rank)).sum()).collect()
    };
    for round in 0..50 {
        for float in [Float::F32, Float::BF16] {
            for (rank, got) in sums(gpus, &all, float, round).into_iter().enumerate() {
                assert_eq!(got, want(round), "rank {rank}, {float:?}, round {round}");
            }
        }
    }
    // What has parted says so, and comes together again.
    all.abort();
    let rows = gpus[0].rows_from(&[1.0; 8], 1, Float::F32)?;
    assert!(all.sum(0, rows).is_err());
    all.renew()?;
    assert_eq!(sums(gpus, &all, Float::F32, 1)[0], want(1));
    Ok(())
}

/// Devices 0 and 1, where they are there.
fn two() -> Result<Option<[Arc<Gpu>; 2]>> {
    match describe(1) {
        Ok(_) => Ok(Some([Arc::new(Gpu::new(0)?), Arc::new(Gpu::new(1)?)])),
        Err(error) => {
            assert!(std::env::var_os("HEARTH_GPUS").is_none(), "{error}");
            println!("there is no second GPU: {error}");
            Ok(None)
        }
    }
}

#[test]
fn one_device_has_the_sum() {
    on_gpu("one_device_has_the_sum", |_, report| {
        report.ask("alone", || check(&[Arc::new(Gpu::new(0)?)]));
    });
}

#[test]
fn two_devices_have_the_same_sum() {
    on_gpu("two_devices_have_the_same_sum", |_, report| {
        report.ask("both", || two()?.map_or(Ok(()), |gpus| check(&gpus)));
    });
}

/// A device that waits in vain for another is let go.
#[test]
fn who_waits_in_vain_is_let_go() {
    let wait = || -> Result<()> {
        let Some(gpus) = two()? else { return Ok(()) };
        let all = Communicators::new(gpus.to_vec())?;
        // Both have met, so that nothing has to be set up between them.
        sums(&gpus, &all, Float::F32, 0);
        thread::scope(|scope| {
            let alone = scope.spawn(|| {
                let x = gpus[0].rows_from(&[1.0; 120], 3, Float::F32)?;
                gpus[0].read(all.sum(0, x)?)
            });
            thread::sleep(Duration::from_millis(300));
            assert!(!alone.is_finished(), "it adds up what is not there");
            all.abort();
            // Whatever it read, it came back.
            drop(alone.join().unwrap());
        });
        all.renew()?;
        let got = sums(&gpus, &all, Float::F32, 2);
        assert_eq!(got[0], got[1]);
        Ok(())
    };
    on_gpu("who_waits_in_vain_is_let_go", |_, report| {
        report.ask("one of two", wait);
    });
}
