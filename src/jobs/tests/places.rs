//! What batches share: places, limits of keys, threads, and room on the disk.

use super::*;

/// It pays when it is begun, and not again when it found no place and comes later.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_is_counted_once_however_often_it_is_tried() {
    let house = House::new();
    house.create(&["a", "b", "c"].map(line).concat());
    let echo = Echo::new(100);
    echo.busy.store(true, Ordering::Relaxed);
    house.run(&echo);
    house.until(is("completed")).await;
    assert!(echo.told_later.load(Ordering::Relaxed) >= 2, "none was tried again");
    assert_eq!(echo.admitted.load(Ordering::Relaxed), 3);
}

/// Both places are the other's while it waits; it goes on when it may.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_at_its_limit_holds_no_place() {
    let house = House::new();
    let echo = Echo::new(0);
    echo.at_limit.store(7, Ordering::Relaxed);
    house.run(&echo);
    let poor = ["one", "two", "three"];
    poor.iter().for_each(|id| house.create_of(7, id, 4));
    until(|| poor.iter().all(|id| house.stands(id).1 == "in_progress")).await;
    house.create_of(8, "other", 6);
    until(|| echo.begun().len() == 2).await;
    echo.permits.add_permits(6);
    until(|| house.stands("other").1 == "completed").await;
    assert!(echo.begun().iter().all(|line| line.starts_with("other")));
    assert_eq!(house.stands("one"), (0, "in_progress".into()));
    echo.permits.add_permits(12);
    echo.at_limit.store(0, Ordering::Relaxed);
    for id in poor {
        until(|| house.stands(id).1 == "completed").await;
    }
    assert_eq!(echo.admitted.load(Ordering::Relaxed), 18);
}

/// Two keys of one project, and two places. One with five batches would have five lines of six if
/// batches took turns; between keys it is one of two, or two of three where a place is free while
/// the other keeps what its last line gave.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_many_batches_leaves_places_to_another() {
    let house = House::new();
    let echo = Echo::new(0);
    house.run(&echo);
    let greedy = ["g1", "g2", "g3", "g4", "g5"];
    greedy.iter().for_each(|id| house.create_of(1, id, 10));
    until(|| echo.begun().len() == 2).await;
    until(|| greedy.iter().all(|id| house.stands(id).1 == "in_progress")).await;
    house.create_of(2, "other", 8);
    until(|| house.stands("other").1 == "in_progress").await;
    let done = || greedy.map(|id| house.stands(id).0).iter().sum::<u64>();
    for ended in 1.. {
        echo.permits.add_permits(1);
        until(|| done() + house.stands("other").0 == ended).await;
        if house.stands("other").0 == 8 {
            break;
        }
        // What is free was given away before the next one ends.
        until(|| echo.begun().len() as u64 == ended + 2).await;
    }
    assert!(done() <= 22, "{} lines of the greedy key: {:?}", done(), echo.begun());
}

/// A disk without room, here rows that are in the way.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_yet_is_kept_later_and_not_run_again() {
    let house = House::new();
    house.create(&["a", "b"].map(line).concat());
    let echo = Echo::new(0);
    house.run(&echo);
    while echo.begun.lock().unwrap().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for id in ["1", "2"] {
        let (id, parent, body) = (id.to_owned(), "batch_1".to_owned(), json!({}));
        let row = Document { id, parent, created_s: 0, expires_s: None, body };
        house.store.write(|tx| tx.insert(ONE, Kind::BatchLine, &row)).unwrap();
    }
    echo.permits.add_permits(2);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let delete = |tx: &Tx<'_>| tx.delete_children(ONE, Kind::BatchLine, "batch_1");
    house.store.write(delete).unwrap();
    let batch = house.until(is("completed")).await;
    assert_eq!(batch["request_counts"], json!({"total": 2, "completed": 2, "failed": 0}));
    assert_eq!(names(&house.lines(&batch["output_file_id"])), ["a", "b"]);
    assert_eq!(echo.begun.lock().unwrap().len(), 2, "a line was run again");
}

/// Looks at a line for as long as the test holds it.
#[derive(Default)]
struct Stuck {
    looks: AtomicUsize,
    held: Mutex<()>,
}

impl Executor for Stuck {
    fn check(&self, _: &str, _: &[u8]) -> Result<Checked, Fault> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        drop(self.held.lock());
        Ok(Checked { custom_id: "a".into(), model: "m".into(), inputs: 1 })
    }

    fn admit(&self, _: Tenant) -> Result<(), Later> {
        Ok(())
    }

    fn run<'a>(
        &'a self,
        _: &'a str,
        _: Tenant,
        _: &'a [u8],
    ) -> BoxFuture<'a, Result<Answer, Later>> {
        futures_util::future::pending().boxed()
    }

    fn at_once(&self) -> usize {
        1
    }

    fn line_bytes_max(&self) -> usize {
        LINE_BYTES_MAX
    }
}

#[test]
fn batches_leave_threads_to_others_however_many_there_are() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(work::THREADS + 1)
        .enable_all()
        .build()
        .unwrap();
    let house = House::new();
    house.upload("file-in", &line("a"));
    for i in 0..8 {
        house.batches.create(&format!("batch_{i}"), &new("file-in")).unwrap();
    }
    let stuck = Arc::<Stuck>::default();
    let held = stuck.held.lock().unwrap();
    let batches = runtime.spawn(Arc::clone(&house.batches).run(Arc::<Stuck>::clone(&stuck)));
    while stuck.looks.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(200)); // the others would look too
    let other = runtime.spawn(async {
        tokio::time::timeout(Duration::from_secs(10), tokio::task::spawn_blocking(|| 7)).await
    });
    let other = runtime.block_on(other).unwrap();
    batches.abort();
    drop(held);
    assert!(matches!(other, Ok(Ok(7))), "batches hold every thread");
}
