//! Stored responses, each with the items that went in and came out.

use serde_json::{Value, json};

use super::conversations::{Known, append, known};
use super::{Document, History, Kind, Listing, Page};
use crate::error::Error;
use crate::store::Tx;
use crate::types::ProjectId;

const KIND: Kind = Kind::Response;
const INPUT: Kind = Kind::ResponseInput;
const OUTPUT: Kind = Kind::ResponseOutput;

/// Responses that one may build on, through `previous_response_id`.
const CHAIN_MAX: usize = 1000;
const DAY_S: u64 = 24 * 3600;
/// Items of one response.
const ITEMS_MAX: usize = 10_000;

/// A response to be kept.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The `response` object.
    pub object: Value,
    /// The items of its request, without those of earlier ones.
    pub input: Vec<Value>,
    /// The conversation that both are appended to.
    pub conversation: Option<String>,
    /// It is stored under its own name, besides.
    pub store: bool,
}

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "response", id: id.to_owned() }
}

impl History {
    /// Keeps a response that has ended. One that was begun with [`History::begin_response`] is
    /// replaced, unless it was cancelled or deleted meanwhile.
    pub fn keep_response(&self, project: ProjectId, reply: &Reply) -> Result<(), Error> {
        let id = reply.object["id"].as_str().unwrap_or_default();
        let output = reply.object["output"].as_array().cloned().unwrap_or_default();
        let end = self.end();
        self.store.write(|tx| {
            if reply.store {
                let end = match tx.get(project, KIND, "", id)? {
                    Some(begun) if is_running(&begun.body) => {
                        let (body, end) = (reply.object.clone(), begun.expires_s);
                        tx.replace(project, KIND, &Document { body, ..begun })?;
                        end
                    }
                    None if reply.object["background"] != true => {
                        tx.insert(project, KIND, &document(&reply.object, end))?;
                        append(tx, project, (INPUT, id), &reply.input, (Known::Passed, end))?;
                        end
                    }
                    // Cancelled or deleted while it ran: that holds.
                    _ => return Ok(()),
                };
                append(tx, project, (OUTPUT, id), &output, (Known::Passed, end))?;
                prolong(tx, project, &reply.object, end)?;
            }
            let Some(conversation) = &reply.conversation else { return Ok(()) };
            known(tx, project, conversation)?;
            let list = (Kind::ConversationItem, conversation.as_str());
            append(tx, project, list, &reply.input, (Known::Passed, None))?;
            append(tx, project, list, &output, (Known::Passed, None))
        })
    }

    /// Keeps a response that will run in the background.
    pub fn begin_response(
        &self,
        project: ProjectId,
        object: &Value,
        input: &[Value],
    ) -> Result<(), Error> {
        let (id, end) = (object["id"].as_str().unwrap_or_default(), self.end());
        self.store.write(|tx| {
            tx.insert(project, KIND, &document(object, end))?;
            append(tx, project, (INPUT, id), input, (Known::Passed, end))
        })
    }

    /// A `response` object.
    pub fn response(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        let found = self.store.read(|tx| tx.get(project, KIND, "", id))?;
        found.map(|document| document.body).ok_or_else(|| not_found(id))
    }

    /// Ends one that runs in the background. Returns the `response` object.
    ///
    /// # Errors
    /// It never ran there.
    pub fn cancel_response(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        self.store.write(|tx| {
            let mut document = tx.get(project, KIND, "", id)?.ok_or_else(|| not_found(id))?;
            if document.body["background"] != true {
                let message = "Cannot cancel a synchronous response.";
                return Err(Error::invalid("response_id", message));
            }
            if is_running(&document.body) {
                document.body["status"] = json!("cancelled");
                tx.replace(project, KIND, &document)?;
            }
            Ok(document.body)
        })
    }

    /// Forgets one.
    pub fn delete_response(&self, project: ProjectId, id: &str) -> Result<(), Error> {
        let gone = self.store.write(|tx| tx.delete(project, KIND, "", id))?;
        if gone { Ok(()) } else { Err(not_found(id)) }
    }

    /// Some of the items that went into one.
    pub fn response_input(
        &self,
        project: ProjectId,
        id: &str,
        page: &Page,
    ) -> Result<Listing, Error> {
        let found = self.store.children(project, (KIND, id), INPUT, page)?;
        found.ok_or_else(|| not_found(id))
    }

    /// Everything that was said up to the end of a response: input and output of its ancestors and
    /// its own, oldest first. Instructions are not handed on.
    pub fn said_until(&self, project: ProjectId, id: &str) -> Result<Vec<Value>, Error> {
        self.store.read(|tx| {
            let (mut turns, mut next) = (Vec::new(), Some(id.to_owned()));
            while let Some(id) = next {
                let response = tx.get(project, KIND, "", &id)?;
                let response = response.ok_or_else(|| previous_not_found(&id))?.body;
                if turns.len() == CHAIN_MAX || is_running(&response) {
                    let message = format!(
                        "Nothing can follow the response '{id}': it is still running, or more than \
                         {CHAIN_MAX} follow each other."
                    );
                    return Err(Error::invalid("previous_response_id", message));
                }
                let mut turn = children(tx, project, INPUT, &id)?;
                turn.extend(children(tx, project, OUTPUT, &id)?);
                turns.push(turn);
                next = previous(&response);
            }
            Ok(turns.into_iter().rev().flatten().collect())
        })
    }

    /// An item of any response or conversation, by its id.
    pub fn find_item(&self, project: ProjectId, id: &str) -> Result<Option<Value>, Error> {
        let kinds = [OUTPUT, INPUT, Kind::ConversationItem];
        self.store.read(|tx| {
            for kind in kinds {
                if let Some(item) = tx.find(project, kind, id)? {
                    return Ok(Some(item.body));
                }
            }
            Ok(None)
        })
    }

    /// At start: responses that ran in the background when the process ended have failed. Another
    /// server on the same folder may still be at work on its own, so these are left to it.
    pub fn fail_interrupted(&self) -> Result<usize, Error> {
        if !self.store.was_alone() {
            return Ok(0);
        }
        let error = json!({"code": "server_error", "message": "The server was stopped."});
        self.store.write(|tx| {
            let mut count = 0;
            for status in ["queued", "in_progress"] {
                for (project, mut document) in tx.with_status(KIND, status)? {
                    document.body["status"] = json!("failed");
                    document.body["error"] = error.clone();
                    tx.replace(project, KIND, &document)?;
                    count += 1;
                }
            }
            Ok(count)
        })
    }
}

fn is_running(response: &Value) -> bool {
    response["status"] == "queued" || response["status"] == "in_progress"
}

fn previous(response: &Value) -> Option<String> {
    response["previous_response_id"].as_str().map(str::to_owned)
}

/// What a response follows lives as long as it: nothing could follow it otherwise. And a day
/// longer, so that the next one has not to say so again.
fn prolong(
    tx: &Tx<'_>,
    project: ProjectId,
    response: &Value,
    end: Option<u64>,
) -> Result<(), Error> {
    let mut next = previous(response);
    for _ in 0..CHAIN_MAX {
        let Some(id) = next else { break };
        let Some(found) = tx.get(project, KIND, "", &id)? else { break };
        match (found.expires_s, end) {
            (Some(own), Some(end)) if own < end => {
                tx.prolong(project, KIND, &id, Some(end.saturating_add(DAY_S)))?;
            }
            (Some(_), None) => tx.prolong(project, KIND, &id, None)?,
            _ => {}
        }
        next = previous(&found.body);
    }
    Ok(())
}

fn previous_not_found(id: &str) -> Error {
    Error::PreviousNotFound(id.to_owned())
}

fn children(tx: &Tx<'_>, project: ProjectId, kind: Kind, id: &str) -> Result<Vec<Value>, Error> {
    let listing = tx.list(project, kind, id, &[], &Page::first(ITEMS_MAX))?;
    Ok(listing.documents.into_iter().map(|document| document.body).collect())
}

fn document(object: &Value, expires_s: Option<u64>) -> Document {
    Document {
        id: object["id"].as_str().unwrap_or_default().to_owned(),
        parent: String::new(),
        created_s: object["created_at"].as_u64().unwrap_or_default(),
        expires_s,
        body: object.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::store::Store;

    const ONE: ProjectId = ProjectId::DEFAULT;

    fn reply(id: &str, previous: Option<&str>, conversation: Option<&str>) -> Reply {
        let item = |name: &str| json!({"id": format!("{name}_{id}"), "type": "message"});
        let object = json!({"id": id, "status": "completed", "created_at": 1, "output":
            [item("out")], "previous_response_id": previous});
        let conversation = conversation.map(str::to_owned);
        Reply { object, input: vec![item("in")], conversation, store: true }
    }

    fn ids(items: &[Value]) -> Vec<&str> {
        items.iter().filter_map(|item| item["id"].as_str()).collect()
    }

    #[test]
    fn answers_have_an_end_and_conversations_have_none() {
        let store = Arc::new(Store::in_memory().unwrap());
        let over = History::new(Arc::clone(&store)).forgetting(Some(Duration::ZERO));
        over.create_conversation(ONE, "conv", serde_json::Map::new(), &[]).unwrap();
        over.keep_response(ONE, &reply("a", None, Some("conv"))).unwrap();
        let begun = json!({"id": "b", "status": "queued", "background": true});
        over.begin_response(ONE, &begun, &reply("b", None, None).input).unwrap();
        let said = [json!({"role": "user", "content": "hi"})];
        over.keep_completion(ONE, json!({"id": "c", "created": 1}), &said).unwrap();
        let gone = |result: Result<Value, Error>| matches!(result, Err(Error::NotFound { .. }));
        assert!(gone(over.response(ONE, "a")) && gone(over.response(ONE, "b")));
        assert!(gone(over.completion(ONE, "c")));
        assert_eq!(ids(&over.all_items(ONE, "conv").unwrap()), ["in_a", "out_a"]);
        // Two responses with three items, a completion with a message.
        let swept = [3, 9, 9].map(|most| store.sweep(most).unwrap().documents);
        assert_eq!(swept, [3, 4, 0]);
        assert_eq!(ids(&over.all_items(ONE, "conv").unwrap()), ["in_a", "out_a"]);
        let ever = History::new(Arc::clone(&store));
        ever.keep_response(ONE, &reply("a", None, None)).unwrap();
        assert!(ever.response(ONE, "a").is_ok());
        assert_eq!(store.sweep(9).unwrap().documents, 0);
    }

    #[test]
    fn what_a_response_follows_lives_as_long_as_it() {
        let store = Arc::new(Store::in_memory().unwrap());
        let hours = |count: u64| Some(Duration::from_secs(3600 * count));
        let history = |lifetime| History::new(Arc::clone(&store)).forgetting(lifetime);
        let end = |id: &str| {
            store.read(|tx| tx.get(ONE, KIND, "", id)).unwrap().expect("it is there").expires_s
        };
        history(hours(1)).keep_response(ONE, &reply("a", None, None)).unwrap();
        history(hours(1)).keep_response(ONE, &reply("b", Some("a"), None)).unwrap();
        let early = end("a").unwrap();
        history(hours(9)).keep_response(ONE, &reply("c", Some("b"), None)).unwrap();
        assert!(end("a") > end("c") && end("b") > end("c"), "{:?}", end("a"));
        assert!(end("c").unwrap() > early);
        let item = store.read(|tx| tx.get(ONE, OUTPUT, "a", "out_a")).unwrap();
        assert_eq!(item.unwrap().expires_s, end("a"));
        // The next one changes nothing before it.
        let before = [end("a"), end("b")];
        history(hours(10)).keep_response(ONE, &reply("d", Some("c"), None)).unwrap();
        assert_eq!([end("a"), end("b")], before);
        history(None).keep_response(ONE, &reply("e", Some("d"), None)).unwrap();
        assert_eq!([end("a"), end("d"), end("e")], [None; 3]);
        let said = history(None).said_until(ONE, "e").unwrap();
        assert_eq!(said.len(), 10);
    }
}
