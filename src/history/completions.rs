//! Stored chat completions, each with the messages that it answers.

use serde_json::{Map, Value, json};

use super::{Document, History, Kind, Listing, Page};
use crate::error::Error;
use crate::store::Match;
use crate::types::ProjectId;

const KIND: Kind = Kind::Completion;
const MESSAGE: Kind = Kind::CompletionMessage;

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "chat completion", id: id.to_owned() }
}

impl History {
    /// Keeps a `chat.completion` object and the messages of its request.
    pub fn keep_completion(
        &self,
        project: ProjectId,
        object: Value,
        messages: &[Value],
    ) -> Result<(), Error> {
        let id = object["id"].as_str().unwrap_or_default().to_owned();
        let created_s = object["created"].as_u64().unwrap_or_default();
        let expires_s = self.end();
        let document = |id, parent, body| Document { id, parent, created_s, expires_s, body };
        self.store.write(|tx| {
            for (i, message) in messages.iter().enumerate() {
                let body = message_object(&format!("{id}-{i}"), message);
                let message = document(format!("{id}-{i}"), id.clone(), body);
                tx.insert(project, MESSAGE, &message)?;
            }
            Ok(tx.insert(project, KIND, &document(id.clone(), String::new(), object))?)
        })
    }

    /// One of them.
    pub fn completion(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        let found = self.store.read(|tx| tx.get(project, KIND, "", id))?;
        found.map(|document| document.body).ok_or_else(|| not_found(id))
    }

    /// Those of one model and with all of these labels.
    pub fn completions(
        &self,
        project: ProjectId,
        model: Option<&str>,
        labels: &[(String, String)],
        page: &Page,
    ) -> Result<Listing, Error> {
        let is =
            |path, key: &str, value: &str| Match { path, key: key.into(), value: value.into() };
        let model = model.map(|model| is("$", "model", model));
        let labels = labels.iter().map(|(key, value)| is("$.metadata", key, value));
        let matches: Vec<_> = model.into_iter().chain(labels).collect();
        Ok(self.store.list(project, KIND, &matches, page)?)
    }

    /// Puts other labels in the place of its own.
    pub fn label_completion(
        &self,
        project: ProjectId,
        id: &str,
        labels: Map<String, Value>,
    ) -> Result<Value, Error> {
        self.store.write(|tx| {
            let mut document = tx.get(project, KIND, "", id)?.ok_or_else(|| not_found(id))?;
            document.body["metadata"] = Value::Object(labels);
            tx.replace(project, KIND, &document)?;
            Ok(document.body)
        })
    }

    /// Forgets one, with its messages.
    pub fn delete_completion(&self, project: ProjectId, id: &str) -> Result<(), Error> {
        let gone = self.store.write(|tx| tx.delete(project, KIND, "", id))?;
        if gone { Ok(()) } else { Err(not_found(id)) }
    }

    /// The messages that it answers.
    pub fn completion_messages(
        &self,
        project: ProjectId,
        id: &str,
        page: &Page,
    ) -> Result<Listing, Error> {
        let found = self.store.children(project, (KIND, id), MESSAGE, page)?;
        found.ok_or_else(|| not_found(id))
    }
}

/// A message as the list of messages shows it: text as text, parts as parts.
fn message_object(id: &str, message: &Value) -> Value {
    let mut object = json!({"id": id, "role": null, "content": null, "name": null,
                            "content_parts": null, "refusal": null});
    for (name, value) in message.as_object().into_iter().flatten() {
        object[name.as_str()] = value.clone();
    }
    if object["content"].is_array() {
        object["content_parts"] = object["content"].take();
    }
    object
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::Store;

    const ONE: ProjectId = ProjectId::DEFAULT;

    fn history() -> History {
        let history = History::new(Arc::new(Store::in_memory().unwrap()));
        for (id, model, label) in [("a", "m", "x"), ("b", "m", "y"), ("c", "n", "x")] {
            let object = json!({"id": id, "model": model, "created": 1, "metadata": {"k": label}});
            let parts = json!([{"type": "text", "text": "hi"}]);
            let messages = [
                json!({"role": "system", "content": "Be."}),
                json!({"role": "user", "content": parts}),
            ];
            history.keep_completion(ONE, object, &messages).unwrap();
        }
        history
    }

    fn page() -> Page {
        Page::first(9)
    }

    fn ids(listing: Listing) -> Vec<String> {
        listing.documents.into_iter().map(|document| document.id).collect()
    }

    #[test]
    fn filters_join() {
        let history = history();
        let label = [("k".to_owned(), "x".to_owned())];
        let list =
            |model, labels: &[_]| ids(history.completions(ONE, model, labels, &page()).unwrap());
        assert_eq!(list(None, &[]), ["a", "b", "c"]);
        assert_eq!(list(Some("m"), &[]), ["a", "b"]);
        assert_eq!(list(None, &label), ["a", "c"]);
        assert_eq!(list(Some("m"), &label), ["a"]);
    }

    #[test]
    fn labels_are_replaced_and_messages_go_with_their_completion() {
        let history = history();
        let labels = Map::from_iter([("new".to_owned(), json!("z"))]);
        let updated = history.label_completion(ONE, "a", labels).unwrap();
        assert_eq!(updated["metadata"], json!({"new": "z"}));
        assert_eq!(history.completion(ONE, "a").unwrap(), updated);
        let messages = history.completion_messages(ONE, "a", &page()).unwrap();
        assert_eq!(messages.documents[0].body["content"], "Be.");
        assert_eq!(messages.documents[1].body["content"], Value::Null);
        assert_eq!(messages.documents[1].body["content_parts"][0]["text"], "hi");
        assert_eq!(ids(messages), ["a-0", "a-1"]);
        history.delete_completion(ONE, "a").unwrap();
        let gone = |result: Result<(), Error>| matches!(result, Err(Error::NotFound { .. }));
        assert!(gone(history.delete_completion(ONE, "a")));
        assert!(gone(history.completion(ONE, "a").map(drop)));
        assert!(gone(history.label_completion(ONE, "a", Map::new()).map(drop)));
        assert!(gone(history.completion_messages(ONE, "a", &page()).map(drop)));
    }
}
