//! JSON objects with an id: found by id, listed by cursor, filtered, replaced, deleted, expired.
//!
//! Every function names a project first: no caller can reach into another's objects. A document may
//! have a parent (an item its conversation, a message its completion) and goes with it.

use rusqlite::types::Value as Sql;
use rusqlite::{OptionalExtension, Row, params, params_from_iter};
use serde_json::Value;

use super::{Store, StoreError, Tx};
use crate::types::ProjectId;

/// What a document is. The word is in the database: never change one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the objects of the API")]
pub enum Kind {
    Completion,
    CompletionMessage,
    Response,
    ResponseInput,
    ResponseOutput,
    Conversation,
    ConversationItem,
    File,
    Upload,
    UploadPart,
    Batch,
    /// What a line of a batch gave; its id is the line's number.
    BatchLine,
}

impl Kind {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Completion => "chat.completion",
            Self::CompletionMessage => "chat.completion.message",
            Self::Response => "response",
            Self::ResponseInput => "response.input",
            Self::ResponseOutput => "response.output",
            Self::Conversation => "conversation",
            Self::ConversationItem => "conversation.item",
            Self::File => "file",
            Self::Upload => "upload",
            Self::UploadPart => "upload.part",
            Self::Batch => "batch",
            Self::BatchLine => "batch.line",
        }
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Unique among its siblings.
    pub id: String,
    /// The document that it belongs to; empty for none.
    pub parent: String,
    /// Unix time in seconds.
    pub created_s: u64,
    /// From this second of Unix time on it is not there any more.
    pub expires_s: Option<u64>,
    /// The object.
    pub body: Value,
}

/// Which part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Only what comes after this id in the order asked for.
    pub after: Option<String>,
    /// Only what comes before this id.
    pub before: Option<String>,
    /// At most so many.
    pub limit: usize,
    /// Newest first.
    pub descending: bool,
}

impl Page {
    /// The oldest of a list, at most so many.
    pub fn first(limit: usize) -> Self {
        Self { after: None, before: None, limit, descending: false }
    }
}

/// A condition on the objects of a list: the member `key` of the object at `path` is `value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Where, as SQLite writes it: `$`, `$.metadata`.
    pub path: &'static str,
    /// Name of the member.
    pub key: String,
    /// What it must be.
    pub value: String,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Listing {
    /// In the order asked for.
    pub documents: Vec<Document>,
    /// There are more behind the last.
    pub has_more: bool,
}

const COLUMNS: &str = "id, parent, created_s, expires_s, body";
const ALIVE: &str = "(expires_s IS NULL OR expires_s > unixepoch())";

fn document(row: &Row<'_>) -> rusqlite::Result<Document> {
    let body: String = row.get(4)?;
    let failed =
        |e| rusqlite::Error::FromSqlConversionFailure(4, rusqlite::types::Type::Text, Box::new(e));
    Ok(Document {
        id: row.get(0)?,
        parent: row.get(1)?,
        created_s: row.get(2)?,
        expires_s: row.get(3)?,
        body: serde_json::from_str(&body).map_err(failed)?,
    })
}

impl Store {
    /// A part of a project's documents of one kind, of which all of `matches` hold.
    ///
    /// # Errors
    /// A cursor of `page` names what is not in the list.
    pub fn list(
        &self,
        project: ProjectId,
        kind: Kind,
        matches: &[Match],
        page: &Page,
    ) -> Result<Listing, StoreError> {
        self.scan(|tx| tx.list(project, kind, "", matches, page))
    }

    /// A part of what belongs to one document; `None` when that is not there.
    ///
    /// # Errors
    /// As of [`Store::list`].
    pub fn children(
        &self,
        project: ProjectId,
        parent: (Kind, &str),
        kind: Kind,
        page: &Page,
    ) -> Result<Option<Listing>, StoreError> {
        self.read(|tx| {
            let (parent_kind, id) = parent;
            let known = tx.get(project, parent_kind, "", id)?;
            known.map(|_| tx.list(project, kind, id, &[], page)).transpose()
        })
    }
}

impl Tx<'_> {
    /// Adds a document at the end of its list.
    pub fn insert(
        &self,
        project: ProjectId,
        kind: Kind,
        document: &Document,
    ) -> Result<(), StoreError> {
        let Document { id, parent, created_s, expires_s, body } = document;
        let sql = "INSERT INTO documents (project, kind, parent, id, created_s, expires_s, body) \
                   VALUES (?, ?, ?, ?, ?, ?, ?)";
        let row = params![project.0, kind.word(), parent, id, created_s, expires_s, text(body)];
        self.0.prepare_cached(sql)?.execute(row)?;
        Ok(())
    }

    /// One document.
    pub fn get(
        &self,
        project: ProjectId,
        kind: Kind,
        parent: &str,
        id: &str,
    ) -> Result<Option<Document>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM documents \
             WHERE project = ? AND kind = ? AND parent = ? AND id = ? AND {ALIVE}"
        );
        let mut query = self.0.prepare_cached(&sql)?;
        let row = params![project.0, kind.word(), parent, id];
        Ok(query.query_row(row, document).optional()?)
    }

    /// Puts another body, and another end, in the place of a document. False when it is not there.
    pub fn replace(
        &self,
        project: ProjectId,
        kind: Kind,
        document: &Document,
    ) -> Result<bool, StoreError> {
        let Document { id, parent, created_s: _, expires_s, body } = document;
        let sql = "UPDATE documents SET body = ?, expires_s = ? \
                   WHERE project = ? AND kind = ? AND parent = ? AND id = ?";
        let row = params![text(body), expires_s, project.0, kind.word(), parent, id];
        Ok(self.0.prepare_cached(sql)?.execute(row)? > 0)
    }

    /// Gives a document that has no parent, and all that belongs to it, another end.
    pub fn prolong(
        &self,
        project: ProjectId,
        kind: Kind,
        id: &str,
        expires_s: Option<u64>,
    ) -> Result<(), StoreError> {
        let sql = "UPDATE documents SET expires_s = ? \
                   WHERE project = ? AND kind = ? AND parent = '' AND id = ?";
        self.0.prepare_cached(sql)?.execute(params![expires_s, project.0, kind.word(), id])?;
        let sql = "UPDATE documents SET expires_s = ? WHERE project = ? AND parent = ?";
        self.0.prepare_cached(sql)?.execute(params![expires_s, project.0, id])?;
        Ok(())
    }

    /// Removes a document and all that belongs to it. False when it is not there.
    pub fn delete(
        &self,
        project: ProjectId,
        kind: Kind,
        parent: &str,
        id: &str,
    ) -> Result<bool, StoreError> {
        let sql = format!(
            "DELETE FROM documents \
             WHERE project = ? AND kind = ? AND parent = ? AND id = ? AND {ALIVE}"
        );
        let row = params![project.0, kind.word(), parent, id];
        if self.0.prepare_cached(&sql)?.execute(row)? == 0 {
            return Ok(false);
        }
        // A child has a name that its client chose, which may be that of somebody's parent.
        if !parent.is_empty() {
            return Ok(true);
        }
        let sql = "DELETE FROM documents WHERE project = ? AND parent = ?";
        self.0.prepare_cached(sql)?.execute(params![project.0, id])?;
        Ok(true)
    }

    /// Removes all documents of one kind under one parent. Returns their ids.
    pub fn delete_children(
        &self,
        project: ProjectId,
        kind: Kind,
        parent: &str,
    ) -> Result<Vec<String>, StoreError> {
        let sql =
            "DELETE FROM documents WHERE project = ? AND kind = ? AND parent = ? RETURNING id";
        let mut query = self.0.prepare_cached(sql)?;
        let ids = query.query_map(params![project.0, kind.word(), parent], |row| row.get(0))?;
        Ok(ids.collect::<Result<_, _>>()?)
    }

    /// Ids of all documents of one kind under one parent.
    pub fn ids(
        &self,
        project: ProjectId,
        kind: Kind,
        parent: &str,
    ) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT id FROM documents WHERE project = ? AND kind = ? AND parent = ?";
        let mut query = self.0.prepare_cached(sql)?;
        let ids = query.query_map(params![project.0, kind.word(), parent], |row| row.get(0))?;
        Ok(ids.collect::<Result<_, _>>()?)
    }

    /// Whether any project has a document of this kind and name: for clearing out, not for callers.
    pub fn exists(&self, kind: Kind, id: &str) -> Result<bool, StoreError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM documents WHERE kind = ? AND id = ?)";
        Ok(self.0.prepare_cached(sql)?.query_row(params![kind.word(), id], |row| row.get(0))?)
    }

    /// The newest document of this kind and name under any parent.
    pub fn find(
        &self,
        project: ProjectId,
        kind: Kind,
        id: &str,
    ) -> Result<Option<Document>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM documents WHERE project = ? AND kind = ? AND id = ? AND {ALIVE} \
             ORDER BY seq DESC LIMIT 1"
        );
        let mut query = self.0.prepare_cached(&sql)?;
        Ok(query.query_row(params![project.0, kind.word(), id], document).optional()?)
    }

    /// Documents of every project whose `status` is this: for whoever takes up work again.
    pub fn with_status(
        &self,
        kind: Kind,
        status: &str,
    ) -> Result<Vec<(ProjectId, Document)>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS}, project FROM documents \
             WHERE kind = ? AND json_extract(body, '$.status') = ? ORDER BY seq"
        );
        let mut query = self.0.prepare_cached(&sql)?;
        let row = |row: &Row<'_>| Ok((ProjectId(row.get(5)?), document(row)?));
        let rows = query.query_map(params![kind.word(), status], row)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The sum of a number (`$.bytes`) over all documents of one kind.
    pub fn sum(&self, project: ProjectId, kind: Kind, path: &str) -> Result<u64, StoreError> {
        let sql = format!(
            "SELECT coalesce(sum(json_extract(body, ?)), 0) FROM documents \
             WHERE project = ? AND kind = ? AND {ALIVE}"
        );
        let row = params![path, project.0, kind.word()];
        Ok(self.0.prepare_cached(&sql)?.query_row(row, |row| row.get(0))?)
    }

    /// A part of the documents of one kind under one parent, of which all of `matches` hold.
    ///
    /// # Errors
    /// `after` or `before` names what is not in the list.
    pub fn list(
        &self,
        project: ProjectId,
        kind: Kind,
        parent: &str,
        matches: &[Match],
        page: &Page,
    ) -> Result<Listing, StoreError> {
        let mut sql = format!(
            "SELECT {COLUMNS} FROM documents \
             WHERE project = ? AND kind = ? AND parent = ? AND {ALIVE}"
        );
        let word = |text: &str| Sql::Text(text.to_owned());
        let mut values = vec![Sql::Integer(project.0), word(kind.word()), word(parent)];
        for Match { path, key, value } in matches {
            sql.push_str(
                " AND EXISTS (SELECT 1 FROM json_each(body, ?) WHERE key = ? AND value = ?)",
            );
            values.extend([word(path), word(key), word(value)]);
        }
        for (cursor, forward) in [(&page.after, true), (&page.before, false)] {
            let Some(id) = cursor else { continue };
            let seq = self.seq(project, kind, parent, id)?;
            let greater = forward != page.descending;
            sql.push_str(if greater { " AND seq > ?" } else { " AND seq < ?" });
            values.push(Sql::Integer(seq));
        }
        // With only `before`, the page is the one that ends there, so it is read backwards.
        let backwards = page.before.is_some() && page.after.is_none();
        let descending = page.descending != backwards;
        let direction = if descending { "DESC" } else { "ASC" };
        sql.push_str(&format!(" ORDER BY seq {direction} LIMIT ?"));
        values.push(Sql::Integer(page.limit as i64 + 1));
        let mut query = self.0.prepare_cached(&sql)?;
        let rows = query.query_map(params_from_iter(values), document)?;
        let mut documents = rows.collect::<Result<Vec<_>, _>>()?;
        let has_more = documents.len() > page.limit;
        documents.truncate(page.limit);
        if backwards {
            documents.reverse();
        }
        Ok(Listing { documents, has_more })
    }

    fn seq(
        &self,
        project: ProjectId,
        kind: Kind,
        parent: &str,
        id: &str,
    ) -> Result<i64, StoreError> {
        let sql = "SELECT seq FROM documents \
                   WHERE project = ? AND kind = ? AND parent = ? AND id = ?";
        let mut query = self.0.prepare_cached(sql)?;
        let row = params![project.0, kind.word(), parent, id];
        let seq = query.query_row(row, |row| row.get(0)).optional()?;
        seq.ok_or_else(|| StoreError::NoSuchCursor(id.to_owned()))
    }
}

fn text(body: &Value) -> String {
    body.to_string()
}
