//! The `batch` object: how it begins, what becomes of it, what it counts. Nothing here waits.

use serde_json::{Value, json};

use super::{Answer, Fault, NewBatch, WINDOW};
use crate::error::Error;
use crate::types::{ProjectId, Tenant, unix_now_s};

/// Seconds of the only completion window.
const WINDOW_S: u64 = 24 * 3600;
/// The statuses of those that are not at their end.
pub(super) const UNFINISHED: [&str; 4] = ["validating", "in_progress", "finalizing", "cancelling"];
/// The member that is not shown.
const OURS: &str = "hearth";

/// A line that was run, or never will be.
pub(super) struct Done {
    /// Its number in the file, from 1.
    pub line: u64,
    /// As the file of answers, or that of errors, has it.
    pub body: Value,
}

/// One that begins now.
pub(super) fn object(id: &str, new: &NewBatch, now_s: u64) -> Value {
    let Tenant { id: tenant, weight, max_running, .. } = new.tenant;
    json!({
        "id": id,
        "object": "batch",
        "endpoint": new.endpoint,
        "model": null,
        "errors": null,
        "input_file_id": new.input_file_id,
        "completion_window": WINDOW,
        "status": "validating",
        "output_file_id": null,
        "error_file_id": null,
        "created_at": now_s,
        "in_progress_at": null,
        "expires_at": now_s + WINDOW_S,
        "finalizing_at": null,
        "completed_at": null,
        "failed_at": null,
        "expired_at": null,
        "cancelling_at": null,
        "cancelled_at": null,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": new.metadata,
        OURS: {
            "tenant": tenant,
            "weight": weight,
            "max_running": max_running,
            "output_lifetime_s": new.output_lifetime_s,
        },
    })
}

/// Without what is ours alone.
pub(super) fn shown(mut body: Value) -> Value {
    body.as_object_mut().map(|batch| batch.remove(OURS));
    body
}

/// On whose account it runs: as the key was when it asked.
pub(super) fn tenant(project: ProjectId, body: &Value) -> Tenant {
    let number = |name: &str| body[OURS][name].as_u64();
    Tenant {
        id: number("tenant").unwrap_or_default(),
        weight: number("weight").and_then(|weight| weight.try_into().ok()).unwrap_or(1),
        max_running: number("max_running").map(|max| max as usize),
        queue_timeout_s: None,
        project,
        background: false,
    }
    .in_background()
}

/// Seconds that its files live.
pub(super) fn output_lifetime_s(body: &Value) -> Option<u64> {
    body[OURS]["output_lifetime_s"].as_u64()
}

/// It has this status from now on.
pub(super) fn enter(body: &mut Value, status: &str) {
    body["status"] = status.into();
    body[format!("{status}_at")] = unix_now_s().into();
}

/// Ends it before its time. False when that was done before.
pub(super) fn cancel(body: &mut Value) -> Result<bool, Error> {
    match body["status"].as_str().unwrap_or_default() {
        "cancelling" | "cancelled" => Ok(false),
        "validating" | "in_progress" => {
            enter(body, "cancelling");
            Ok(true)
        }
        status => {
            let message = format!("Cannot cancel a batch with the status '{status}'.");
            Err(Error::invalid("batch_id", message))
        }
    }
}

/// It cannot be run, because of these.
pub(super) fn fail(body: &mut Value, errors: Vec<Value>) {
    body["errors"] = json!({"object": "list", "data": errors});
    enter(body, "failed");
}

/// An entry of `errors`.
pub(super) fn error(line: Option<u64>, fault: Fault) -> Value {
    let Fault { code, message, param } = fault;
    json!({"code": code, "message": message, "param": param, "line": line})
}

/// What a line gave.
pub(super) fn answered(batch: &str, line: u64, answer: Answer) -> Done {
    let Answer { custom_id, status, request_id, body } = answer;
    let response = json!({"status_code": status, "request_id": request_id, "body": body});
    let id = request_id_of(batch, line);
    let body = json!({"id": id, "custom_id": custom_id, "response": response, "error": null});
    Done { line, body }
}

/// What is said of a line that was not run before its batch ended.
pub(super) fn not_run(batch: &str, line: u64, custom_id: &str, cancelled: bool) -> Value {
    let (code, message) = match cancelled {
        true => {
            ("batch_cancelled", "This request was not executed before the batch was cancelled.")
        }
        false => (
            "batch_expired",
            "This request could not be executed before the completion window expired.",
        ),
    };
    let error = json!({"code": code, "message": message});
    let id = request_id_of(batch, line);
    json!({"id": id, "custom_id": custom_id, "response": null, "error": error})
}

/// Whether a line belongs into the file of answers.
pub(super) fn is_success(line: &Value) -> bool {
    line["response"]["status_code"].as_u64().is_some_and(|status| (200..300).contains(&status))
}

/// Counts lines that were run.
pub(super) fn count(body: &mut Value, lines: &[Done]) {
    for Done { body: line, .. } in lines {
        let name = if is_success(line) { "completed" } else { "failed" };
        add(&mut body["request_counts"][name], Some(1));
        let used = &line["response"]["body"]["usage"];
        // Chats speak of prompts and completions, responses of input and output.
        let number = |names: [&str; 2]| names.iter().find_map(|name| used[*name].as_u64());
        let detail = |parents: [&str; 2], name: &str| {
            parents.iter().find_map(|parent| used[*parent][name].as_u64())
        };
        let usage = &mut body["usage"];
        add(&mut usage["input_tokens"], number(["input_tokens", "prompt_tokens"]));
        add(&mut usage["output_tokens"], number(["output_tokens", "completion_tokens"]));
        add(&mut usage["total_tokens"], used["total_tokens"].as_u64());
        let cached = detail(["input_tokens_details", "prompt_tokens_details"], "cached_tokens");
        add(&mut usage["input_tokens_details"]["cached_tokens"], cached);
        let reasoning =
            detail(["output_tokens_details", "completion_tokens_details"], "reasoning_tokens");
        add(&mut usage["output_tokens_details"]["reasoning_tokens"], reasoning);
    }
}

fn add(sum: &mut Value, more: Option<u64>) {
    *sum = (sum.as_u64().unwrap_or_default() + more.unwrap_or_default()).into();
}

/// The same whenever it is asked for, so that a line that is run again is the same line.
fn request_id_of(batch: &str, line: u64) -> String {
    format!("batch_req_{}-{line}", bare(batch))
}

/// The names of the two files: those of a batch whose end was not reached are overwritten.
pub(super) fn file_id(batch: &str, which: &str) -> String {
    format!("file-{}-{which}", bare(batch))
}

fn bare(batch: &str) -> &str {
    batch.strip_prefix("batch_").unwrap_or(batch)
}
