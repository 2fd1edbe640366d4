//! Ranks that meet, and ranks that do not come.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use hearth_kernels::Pool;
use hearth_kernels::quant::DType;

use super::*;
use crate::backend::Fused;
use crate::decoder::Decoder;
use crate::weights::Loader;
use crate::{KvDType, tiny};

/// What `work` gives, or a failure where it hangs.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || tell.send(work()));
    told.recv_timeout(Duration::from_secs(60)).expect("somebody waits for ever")
}

/// Sums of floats depend on their order: it is that of the ranks, whoever comes last.
#[test]
fn sums_have_the_order_of_the_ranks() {
    const ROUNDS: usize = 400;
    let value = |rank: usize, round: usize| [1e8, 1.0, -1e8, 0.5][(rank + round) % 4] + rank as f32;
    let all = in_time(move || {
        let work = |seat: Seat| {
            let rank = seat.rank();
            let round = move |round: usize| {
                if (rank + round).is_multiple_of(7) {
                    thread::sleep(Duration::from_micros(100));
                }
                let mut x = [value(rank, round), round as f32];
                seat.sum(&mut x).unwrap();
                x.map(f32::to_bits)
            };
            thread::spawn(move || (0..ROUNDS).map(round).collect::<Vec<_>>())
        };
        let running: Vec<_> = Group::new(4).seats().into_iter().map(work).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    for rank in all {
        for (round, got) in rank.into_iter().enumerate() {
            let sum = (1..4).fold(value(0, round), |sum, rank| sum + value(rank, round));
            assert_eq!(got, [sum, 4.0 * round as f32].map(f32::to_bits), "round {round}");
        }
    }
}

#[test]
fn ranks_do_not_add_up_rows_of_different_shapes() {
    let errors = in_time(|| {
        let work = |seat: Seat| {
            thread::spawn(move || {
                let summed = seat.sum(&mut vec![0.0; 3 + seat.rank()]);
                seat.group().fail();
                summed.unwrap_err().to_string()
            })
        };
        let running: Vec<_> = Group::new(2).seats().into_iter().map(work).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(errors.iter().any(|e| e.contains("shapes")), "{errors:?}");
}

const FINE: u8 = 0;
const ERROR: u8 = 1;
const PANIC: u8 = 2;

/// A rank that does what it is told to before the others meet it.
struct Rank {
    model: Box<dyn Model>,
    mood: Arc<AtomicU8>,
}

impl Model for Rank {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore> {
        self.model.kv_store(geometry)
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass> {
        match self.mood.load(Ordering::Relaxed) {
            ERROR => Err(Error::Batch("out of sorts".into())),
            PANIC => panic!("out of its mind"),
            _ => self.model.launch(batch, kv, wanted),
        }
    }

    fn put_adapters(&mut self, slot: LoraSlot, adapters: &[(Arc<Adapter>, f32)]) -> Result<()> {
        self.model.put_adapters(slot, adapters)
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        self.model.drop_adapters(slot);
    }
}

/// A rank that fails, in either way and whichever it is, fails the step and no other.
#[test]
fn a_rank_that_fails_is_an_error_of_the_step() {
    let config = ModelConfig { kv_head_count: 4, ..tiny::config() };
    let weights = tiny::weights(&config, DType::F32, 3).unwrap();
    let moods: Vec<Arc<AtomicU8>> = (0..4).map(|_| Arc::default()).collect();
    let model = Parallel::load(&config, Group::new(4), |part, seat| {
        let mut progress = |_| {};
        let mut loader = Loader::new(&weights, &config, &mut progress);
        let mood = Arc::clone(&moods[part.rank]);
        let ops = Fused::new(Arc::new(Pool::new(1))).seated(seat);
        let model = Decoder::load(part.config.clone(), &mut loader.part(part), ops)?;
        Ok(Box::new(Rank { model: Box::new(model), mood }))
    })
    .unwrap();
    in_time(move || {
        let batch = ForwardBatch::whole(&[5, 6, 7], 0, 16);
        let mut kv = model.kv_store(config.kv_geometry(1, 16, KvDType::F32)).unwrap();
        let want = model.forward(&batch, &mut kv).unwrap();
        for (rank, mood) in moods.iter().enumerate() {
            for (told, word) in [(ERROR, "out of sorts"), (PANIC, "out of its mind")] {
                mood.store(told, Ordering::Relaxed);
                let error = model.forward(&batch, &mut kv).unwrap_err().to_string();
                assert!(error.contains(word), "rank {rank}: {error}");
                mood.store(FINE, Ordering::Relaxed);
                assert_eq!(model.forward(&batch, &mut kv).unwrap(), want, "after rank {rank}");
            }
        }
    });
}

/// Stores are not passed between a model and its ranks, and their blocks stay where they are.
#[test]
fn a_store_of_another_model_is_refused() {
    let config = tiny::config();
    let [one, two] = [1, 2].map(|size| {
        tiny::load(&config, DType::F32, 3, &tiny::compute(2).divided(size).unwrap()).unwrap()
    });
    let geometry = config.kv_geometry(1, 16, KvDType::F32);
    let batch = ForwardBatch::whole(&[5, 6, 7], 0, 16);
    let mut kv = one.kv_store(geometry).unwrap();
    assert!(two.forward(&batch, &mut kv).unwrap_err().to_string().contains("another backend"));
    let mut kv = two.kv_store(geometry).unwrap();
    assert!(one.forward(&batch, &mut kv).unwrap_err().to_string().contains("another backend"));
    assert!(kv.layout().is_none() && kv.export_block(0, &mut Vec::new()).is_err());
}
