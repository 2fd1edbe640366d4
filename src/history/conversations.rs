//! Conversations: a list of items under one name, which responses read and append to.

use serde_json::{Map, Value, json};

use super::{Document, History, Kind, Listing, Page};
use crate::error::Error;
use crate::store::Tx;
use crate::types::{ProjectId, unix_now_s};

const KIND: Kind = Kind::Conversation;
const ITEM: Kind = Kind::ConversationItem;

/// Items of one conversation that a response reads. More would not fit into any context.
const ITEMS_MAX: usize = 10_000;

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "conversation", id: id.to_owned() }
}

impl History {
    /// Begins one with these items. Returns the `conversation` object.
    pub fn create_conversation(
        &self,
        project: ProjectId,
        id: &str,
        labels: Map<String, Value>,
        items: &[Value],
    ) -> Result<Value, Error> {
        let created_s = unix_now_s();
        let body = json!({"id": id, "object": "conversation", "created_at": created_s,
                          "metadata": labels});
        let (name, parent) = (id.to_owned(), String::new());
        let document = Document { id: name, parent, created_s, expires_s: None, body };
        self.store.write(|tx| {
            tx.insert(project, KIND, &document)?;
            append(tx, project, (ITEM, id), items, (Known::Refused, None))
        })?;
        Ok(document.body)
    }

    /// A `conversation` object.
    pub fn conversation(&self, project: ProjectId, id: &str) -> Result<Value, Error> {
        self.store.read(|tx| Ok(known(tx, project, id)?.body))
    }

    /// Puts other labels in the place of its own.
    pub fn label_conversation(
        &self,
        project: ProjectId,
        id: &str,
        labels: Map<String, Value>,
    ) -> Result<Value, Error> {
        self.store.write(|tx| {
            let mut document = known(tx, project, id)?;
            document.body["metadata"] = Value::Object(labels);
            tx.replace(project, KIND, &document)?;
            Ok(document.body)
        })
    }

    /// Forgets one, with its items.
    pub fn delete_conversation(&self, project: ProjectId, id: &str) -> Result<(), Error> {
        let gone = self.store.write(|tx| tx.delete(project, KIND, "", id))?;
        if gone { Ok(()) } else { Err(not_found(id)) }
    }

    /// Adds items at its end.
    pub fn add_items(
        &self,
        project: ProjectId,
        conversation: &str,
        items: &[Value],
    ) -> Result<(), Error> {
        self.store.write(|tx| {
            known(tx, project, conversation)?;
            append(tx, project, (ITEM, conversation), items, (Known::Refused, None))
        })
    }

    /// Some of its items.
    pub fn items(
        &self,
        project: ProjectId,
        conversation: &str,
        page: &Page,
    ) -> Result<Listing, Error> {
        let found = self.store.children(project, (KIND, conversation), ITEM, page)?;
        found.ok_or_else(|| not_found(conversation))
    }

    /// All of its items, oldest first.
    pub fn all_items(&self, project: ProjectId, conversation: &str) -> Result<Vec<Value>, Error> {
        let listing = self.items(project, conversation, &Page::first(ITEMS_MAX))?;
        if listing.has_more {
            let message = format!("The conversation has more than {ITEMS_MAX} items.");
            return Err(Error::invalid("conversation", message));
        }
        Ok(listing.documents.into_iter().map(|document| document.body).collect())
    }

    /// One of its items.
    pub fn item(&self, project: ProjectId, conversation: &str, id: &str) -> Result<Value, Error> {
        self.store.read(|tx| {
            known(tx, project, conversation)?;
            let item = tx.get(project, ITEM, conversation, id)?;
            item.map(|item| item.body).ok_or_else(|| no_item(id))
        })
    }

    /// Forgets one of its items. Returns the `conversation` object.
    pub fn delete_item(
        &self,
        project: ProjectId,
        conversation: &str,
        id: &str,
    ) -> Result<Value, Error> {
        self.store.write(|tx| {
            let document = known(tx, project, conversation)?;
            match tx.delete(project, ITEM, conversation, id)? {
                true => Ok(document.body),
                false => Err(no_item(id)),
            }
        })
    }
}

fn no_item(id: &str) -> Error {
    Error::NotFound { what: "item", id: id.to_owned() }
}

pub(super) fn known(tx: &Tx<'_>, project: ProjectId, id: &str) -> Result<Document, Error> {
    tx.get(project, KIND, "", id)?.ok_or_else(|| not_found(id))
}

/// What becomes of an item that is in the list already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Refused,
    Passed,
}

/// Adds items, which have their ids, to the list of one parent; with an end, where it has one.
pub(super) fn append(
    tx: &Tx<'_>,
    project: ProjectId,
    (kind, parent): (Kind, &str),
    items: &[Value],
    (duplicates, expires_s): (Known, Option<u64>),
) -> Result<(), Error> {
    let created_s = unix_now_s();
    for body in items {
        let id = body["id"].as_str().unwrap_or_default().to_owned();
        if tx.get(project, kind, parent, &id)?.is_some() {
            if duplicates == Known::Passed {
                continue;
            }
            let message = format!("There is an item with the id '{id}' already.");
            return Err(Error::invalid("items", message));
        }
        let (parent, body) = (parent.to_owned(), body.clone());
        tx.insert(project, kind, &Document { id, parent, created_s, expires_s, body })?;
    }
    Ok(())
}
