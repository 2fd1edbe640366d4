//! Batches against their promises, with lines that say themselves how they end.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::*;
use crate::files::{NewFile, Quota};

mod places;

const ONE: ProjectId = ProjectId::DEFAULT;
const ENDPOINT: &str = "/v1/echo";
const LINE_BYTES_MAX: usize = 200;

/// Answers a line with its own `say`, a status of its own if it has one, when there is a permit.
struct Echo {
    permits: Semaphore,
    /// Names of the lines that were begun, in order.
    begun: Mutex<Vec<String>>,
    /// Two lines are told to come later.
    busy: AtomicBool,
    told_later: AtomicUsize,
    /// Lines that were counted.
    admitted: AtomicUsize,
    /// A key that may have none; no key is 0.
    at_limit: AtomicU64,
}

impl Echo {
    fn new(permits: usize) -> Arc<Self> {
        let (begun, busy, told_later, admitted, at_limit) = Default::default();
        let permits = Semaphore::new(permits);
        Arc::new(Self { permits, begun, busy, told_later, admitted, at_limit })
    }

    fn begun(&self) -> Vec<String> {
        self.begun.lock().unwrap().clone()
    }

    async fn answer(&self, line: &[u8]) -> Result<Answer, Later> {
        if self.busy.load(Ordering::Relaxed) && self.told_later.fetch_add(1, Ordering::Relaxed) < 2
        {
            return Err(Later { wait: Duration::from_millis(1) });
        }
        let line: Value = serde_json::from_slice(line).unwrap();
        let custom_id = line["custom_id"].as_str().unwrap().to_owned();
        self.begun.lock().unwrap().push(custom_id.clone());
        self.permits.acquire().await.unwrap().forget();
        let status = line["status"].as_u64().unwrap_or(200) as u16;
        let usage = json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                           "prompt_tokens_details": {"cached_tokens": 1}});
        let body = json!({"said": line["say"], "usage": usage});
        Ok(Answer { custom_id, status, request_id: "req_1".into(), body })
    }
}

impl Executor for Echo {
    fn check(&self, endpoint: &str, line: &[u8]) -> Result<Checked, Fault> {
        assert_eq!(endpoint, ENDPOINT);
        let line: Value = serde_json::from_slice(line).unwrap_or_default();
        let word = |name: &str| line[name].as_str().map(str::to_owned);
        let fault = |code: &str, param: Option<&str>| Fault {
            code: code.into(),
            message: "no".into(),
            param: param.map(str::to_owned),
        };
        if !line.is_object() {
            return Err(fault("invalid_json_line", None));
        }
        let custom_id = word("custom_id").ok_or_else(|| fault("missing", Some("custom_id")))?;
        Ok(Checked { custom_id, model: word("model").unwrap_or("m".into()), inputs: 1 })
    }

    fn admit(&self, tenant: Tenant) -> Result<(), Later> {
        if tenant.key() != 0 && tenant.key() == self.at_limit.load(Ordering::Relaxed) {
            return Err(Later { wait: Duration::from_secs(3600) });
        }
        self.admitted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn run<'a>(
        &'a self,
        _: &'a str,
        tenant: Tenant,
        line: &'a [u8],
    ) -> BoxFuture<'a, Result<Answer, Later>> {
        assert!(tenant.background && tenant.project == ONE);
        self.answer(line).boxed()
    }

    fn at_once(&self) -> usize {
        2
    }

    fn line_bytes_max(&self) -> usize {
        LINE_BYTES_MAX
    }
}

struct House {
    store: Arc<Store>,
    files: Arc<Files>,
    batches: Arc<Batches>,
}

impl House {
    fn new() -> Self {
        Self::over(Arc::new(Store::in_memory().unwrap()), None)
    }

    fn over(store: Arc<Store>, files: Option<Arc<Files>>) -> Self {
        let fresh = || Files::open(Arc::clone(&store), Quota { project_bytes_max: 64 << 20 });
        let files = files.unwrap_or_else(|| Arc::new(fresh().unwrap()));
        let batches = Arc::new(Batches::open(Arc::clone(&store), Arc::clone(&files)).unwrap());
        Self { store, files, batches }
    }

    /// The same after the end of the process.
    fn again(self) -> Self {
        Self::over(self.store, Some(self.files))
    }

    fn upload(&self, id: &str, text: &str) {
        let mut content = self.files.write(4 << 20).unwrap();
        content.push(text.as_bytes()).unwrap();
        let (filename, purpose) = ("a.jsonl".into(), "batch".into());
        let new = NewFile { filename, purpose, lifetime_s: None };
        self.files.keep(ONE, id, &new, content).unwrap();
    }

    fn create(&self, text: &str) -> Value {
        self.upload("file-in", text);
        self.batches.create("batch_1", &new("file-in")).unwrap()
    }

    /// A batch of a key, with so many lines that are called after it.
    fn create_of(&self, key: u64, id: &str, lines: usize) {
        let (file, name) = (format!("file-{id}"), |i: usize| line(&format!("{id} {i}")));
        self.upload(&file, &(0..lines).map(name).collect::<String>());
        let tenant = Tenant { id: key, ..Tenant::default() };
        self.batches.create(id, &NewBatch { tenant, ..new(&file) }).unwrap();
    }

    /// Lines that were run, and the status.
    fn stands(&self, id: &str) -> (u64, String) {
        let batch = self.batches.get(ONE, id).unwrap();
        let completed = batch["request_counts"]["completed"].as_u64().unwrap();
        (completed, batch["status"].as_str().unwrap().to_owned())
    }

    fn run(&self, echo: &Arc<Echo>) -> JoinHandle<()> {
        tokio::spawn(Arc::clone(&self.batches).run(Arc::<Echo>::clone(echo)))
    }

    fn get(&self) -> Value {
        self.batches.get(ONE, "batch_1").unwrap()
    }

    async fn until(&self, is_so: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..20_000 {
            let batch = self.get();
            if is_so(&batch) {
                return batch;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it never came to that: {}", self.get());
    }

    /// The lines of one of its files.
    fn lines(&self, id: &Value) -> Vec<Value> {
        let (object, file) = self.files.content(ONE, id.as_str().unwrap()).unwrap();
        assert_eq!(object["purpose"], "batch_output");
        let text = std::io::read_to_string(file).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn kept_lines(&self) -> usize {
        self.store.read(|tx| tx.ids(ONE, Kind::BatchLine, "batch_1")).unwrap().len()
    }
}

fn new(input_file_id: &str) -> NewBatch {
    NewBatch {
        input_file_id: input_file_id.into(),
        endpoint: ENDPOINT.into(),
        metadata: None,
        output_lifetime_s: Some(3600),
        tenant: Tenant::default(),
    }
}

fn line(name: &str) -> String {
    format!("{{\"custom_id\": \"{name}\", \"say\": \"{name}!\"}}\n")
}

fn names(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["custom_id"].as_str().unwrap()).collect()
}

fn is(status: &str) -> impl Fn(&Value) -> bool {
    move |batch| batch["status"] == status
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_run_and_lies_in_one_of_two_files_in_order() {
    let house = House::new();
    let bad = "{\"custom_id\": \"b\", \"status\": 400, \"say\": 1}\r\n";
    let text = format!("\u{feff}{}\n{bad}{}{}", line("a"), line("c"), line("d").trim());
    let begun = house.create(&text);
    assert_eq!((&begun["status"], &begun["in_progress_at"]), (&json!("validating"), &Value::Null));
    assert_eq!(begun["expires_at"], begun["created_at"].as_u64().unwrap() + 86_400);
    let echo = Echo::new(100);
    echo.busy.store(true, Ordering::Relaxed);
    house.run(&echo);
    let batch = house.until(is("completed")).await;
    assert_eq!(batch["request_counts"], json!({"total": 4, "completed": 3, "failed": 1}));
    assert_eq!((&batch["model"], &batch["errors"]), (&json!("m"), &Value::Null));
    assert_eq!(batch["usage"]["input_tokens"], 12);
    assert_eq!(batch["usage"]["input_tokens_details"], json!({"cached_tokens": 4}));
    for at in ["created_at", "in_progress_at", "finalizing_at", "completed_at"] {
        assert!(batch[at].as_u64().is_some(), "{at}");
    }
    assert!(batch.get("hearth").is_none());
    let output = house.lines(&batch["output_file_id"]);
    assert_eq!(names(&output), ["a", "c", "d"]);
    assert_eq!(output[0]["response"]["body"]["said"], "a!");
    assert_eq!((&output[0]["id"], &output[0]["error"]), (&json!("batch_req_1-1"), &Value::Null));
    let errors = house.lines(&batch["error_file_id"]);
    assert_eq!((names(&errors), &errors[0]["response"]["status_code"]), (vec!["b"], &json!(400)));
    let file = house.files.get(ONE, batch["output_file_id"].as_str().unwrap()).unwrap();
    assert_eq!(file["expires_at"], file["created_at"].as_u64().unwrap() + 3600);
    assert_eq!(house.kept_lines(), 0);
    assert!(house.batches.cancel(ONE, "batch_1").is_err());
}

async fn until(mut is_so: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(100), "it never came to that");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_lines_stop_a_batch_before_it_begins() {
    let house = House::new();
    let long = "x".repeat(LINE_BYTES_MAX * 3);
    let text = format!("{}nonsense\n{}{{\"say\": 1}}\n{long}\n{}", line("a"), line("a"), line("b"));
    house.create(&text);
    let echo = Echo::new(100);
    house.run(&echo);
    let batch = house.until(is("failed")).await;
    let errors = batch["errors"]["data"].as_array().unwrap();
    let errors: Vec<_> = errors.iter().map(|e| (&e["line"], &e["code"], &e["param"])).collect();
    let (custom_id, none) = (json!("custom_id"), Value::Null);
    let expected = [
        (&json!(2), &json!("invalid_json_line"), &none),
        (&json!(3), &json!("duplicate_custom_id"), &custom_id),
        (&json!(4), &json!("missing"), &custom_id),
        (&json!(5), &json!("request_too_large"), &none),
    ];
    assert_eq!(errors, expected);
    assert!(batch["failed_at"].as_u64().is_some() && batch["output_file_id"].is_null());
    assert_eq!(echo.begun.lock().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_nothing_and_of_too_much_are_refused() {
    let failed = async |text: &str| {
        let house = House::new();
        house.create(text);
        house.run(&Echo::new(0));
        house.until(is("failed")).await["errors"]["data"].as_array().unwrap().clone()
    };
    assert_eq!(failed("\n \n").await[0]["code"], "empty_file");
    let many = failed(&"x\n".repeat(200)).await;
    assert_eq!((many.len(), &many[100]["code"]), (101, &json!("too_many_errors")));
    let lines: String = (0..=LINES_MAX).map(|i| format!("{{\"custom_id\":\"{i}\"}}\n")).collect();
    let lines = failed(&lines).await;
    assert_eq!((&lines[0]["code"], &lines[0]["line"]), (&json!("too_many_tasks"), &json!(50_001)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_cut_off_goes_on_where_it_was() {
    let house = House::new();
    house.create(&(0..20).map(|i| line(&i.to_string())).collect::<String>());
    let mut house = house;
    let mut begun = 0;
    for (round, done) in [5, 11, 18].into_iter().enumerate() {
        let before = [0, 5, 11][round];
        let echo = Echo::new(done - before);
        let task = house.run(&echo);
        house.until(|batch| batch["request_counts"]["completed"] == done).await;
        task.abort();
        let _ = task.await;
        begun += echo.begun.lock().unwrap().len();
        house = house.again();
    }
    assert!(begun >= 18);
    house.run(&Echo::new(100));
    let batch = house.until(is("completed")).await;
    assert_eq!(batch["request_counts"], json!({"total": 20, "completed": 20, "failed": 0}));
    let expected: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    assert_eq!(names(&house.lines(&batch["output_file_id"])), expected);
}

/// As many as a file may have.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_thousand_lines_are_answered_once_though_it_is_cut_off() {
    let mut house = House::new();
    let expected: Vec<String> = (0..LINES_MAX).map(|i| i.to_string()).collect();
    house.create(&expected.iter().map(|name| line(name)).collect::<String>());
    let parts = [LINES_MAX / 3, LINES_MAX / 2];
    for done in parts {
        let task = house.run(&Echo::new(LINES_MAX));
        house
            .until(|batch| batch["request_counts"]["completed"].as_u64() >= Some(done as u64))
            .await;
        task.abort();
        let _ = task.await;
        house = house.again();
    }
    let before = house.get()["request_counts"]["completed"].as_u64().unwrap() as usize;
    assert!(before < LINES_MAX, "it was not cut off");
    let echo = Echo::new(LINES_MAX);
    house.run(&echo);
    let batch = house.until(is("completed")).await;
    let counts = json!({"total": LINES_MAX, "completed": LINES_MAX, "failed": 0});
    assert_eq!(batch["request_counts"], counts);
    assert_eq!(names(&house.lines(&batch["output_file_id"])), expected);
    assert!(echo.begun.lock().unwrap().len() <= LINES_MAX - before, "a line was run again");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_before_a_batch_was_cancelled_is_kept() {
    let house = House::new();
    house.create(&["a", "b", "c", "d"].map(line).concat());
    let echo = Echo::new(1);
    house.run(&echo);
    house.until(|batch| batch["request_counts"]["completed"] == 1).await;
    let batch = house.batches.cancel(ONE, "batch_1").unwrap();
    assert_eq!(batch["status"], "cancelling");
    let batch = house.until(is("cancelled")).await;
    assert!(batch["cancelling_at"].as_u64() <= batch["cancelled_at"].as_u64());
    let (output, errors) = (&batch["output_file_id"], &batch["error_file_id"]);
    assert_eq!(house.lines(output).len(), 1);
    let errors = house.lines(errors);
    assert_eq!(errors.len(), 3);
    assert!(errors.iter().all(|line| line["error"]["code"] == "batch_cancelled"));
    assert_eq!(house.batches.cancel(ONE, "batch_1").unwrap(), batch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_waits_is_cancelled_at_once_and_has_no_files() {
    let house = House::new();
    house.create(&line("a"));
    house.batches.cancel(ONE, "batch_1").unwrap();
    house.run(&Echo::new(100));
    let batch = house.until(is("cancelled")).await;
    assert!(batch["output_file_id"].is_null() && batch["error_file_id"].is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_come_too_late_are_said_to_be() {
    let house = House::new();
    house.create(&["a", "b"].map(line).concat());
    let echo = Echo::new(1);
    let task = house.run(&echo);
    house.until(|batch| batch["request_counts"]["completed"] == 1).await;
    task.abort();
    let _ = task.await;
    let late = |tx: &Tx<'_>| {
        let mut document = known(tx, ONE, "batch_1")?;
        document.body["expires_at"] = json!(unix_now_s());
        tx.replace(ONE, Kind::Batch, &document)?;
        Ok::<_, Error>(())
    };
    house.store.write(late).unwrap();
    let house = house.again();
    house.run(&Echo::new(0));
    let batch = house.until(is("expired")).await;
    assert_eq!(batch["request_counts"], json!({"total": 2, "completed": 1, "failed": 0}));
    assert_eq!(house.lines(&batch["error_file_id"])[0]["error"]["code"], "batch_expired");
    assert!(batch["expired_at"].as_u64().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_input_is_deleted_keeps_what_it_has() {
    let house = House::new();
    house.create(&["a", "b"].map(line).concat());
    let echo = Echo::new(1);
    let task = house.run(&echo);
    house.until(|batch| batch["request_counts"]["completed"] == 1).await;
    task.abort();
    let _ = task.await;
    house.files.delete(ONE, "file-in").unwrap();
    let house = house.again();
    house.run(&Echo::new(100));
    let batch = house.until(is("failed")).await;
    assert_eq!(batch["errors"]["data"][0]["code"], "input_file_not_found");
    assert_eq!(house.lines(&batch["output_file_id"]).len(), 1);
}

#[test]
fn inputs_are_checked_and_other_projects_see_nothing() {
    let house = House::new();
    let param = |id: &str| match house.batches.create("batch_2", &new(id)).unwrap_err() {
        Error::InvalidValue { param, .. } => param,
        other => panic!("{other}"),
    };
    assert_eq!(param("file-none"), "input_file_id");
    let content = house.files.write(10).unwrap();
    let (filename, purpose) = ("a".into(), "user_data".into());
    let user = NewFile { filename, purpose, lifetime_s: None };
    house.files.keep(ONE, "file-user", &user, content).unwrap();
    assert_eq!(param("file-user"), "input_file_id");
    house.create(&line("a"));
    let other = ProjectId(2);
    let page = Page { after: None, before: None, limit: 9, descending: true };
    assert_eq!(house.batches.list(ONE, &page).unwrap().documents.len(), 1);
    assert_eq!(house.batches.list(other, &page).unwrap().documents.len(), 0);
    assert!(matches!(house.batches.get(other, "batch_1"), Err(Error::NotFound { .. })));
    assert!(matches!(house.batches.cancel(other, "batch_1"), Err(Error::NotFound { .. })));
}
