//! Rows of projects and API keys. Never a key itself, only its hash; rows are never deleted, so
//! that a server that once had keys is not open again when the last one is revoked.

use rusqlite::{OptionalExtension, Row, params};

use super::{StoreError, Tx};
use crate::types::ProjectId;

/// What is chosen for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewKey {
    /// For people.
    pub name: String,
    /// Name of the project whose objects it sees; made when there is none.
    pub project: String,
    /// It may manage keys.
    pub admin: bool,
    /// Share of the machine beside other keys that want it.
    pub weight: u32,
    /// Requests that run at once.
    pub max_running: Option<u32>,
    /// Requests in a minute.
    pub requests_per_min: Option<u32>,
    /// Tokens in a minute, of prompts and answers together.
    pub tokens_per_min: Option<u32>,
    /// Seconds after which a request that was not begun is told so.
    pub queue_timeout_s: Option<u32>,
    /// From this second of Unix time on it opens nothing.
    pub expires_s: Option<u64>,
}

impl NewKey {
    /// One for everyday work, without limits.
    pub fn named(name: &str, project: &str) -> Self {
        Self {
            name: name.to_owned(),
            project: project.to_owned(),
            admin: false,
            weight: 1,
            max_running: None,
            requests_per_min: None,
            tokens_per_min: None,
            queue_timeout_s: None,
            expires_s: None,
        }
    }
}

/// A key as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// Never used twice.
    pub id: i64,
    /// Whose objects it sees.
    pub project: ProjectId,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// Its last characters, for people.
    pub hint: String,
    /// When it was made, in seconds of Unix time.
    pub created_s: u64,
    /// When it was revoked.
    pub revoked_s: Option<u64>,
    /// What was chosen for it.
    pub key: NewKey,
}

const COLUMNS: &str = "keys.id, project, projects.name, keys.name, hash, hint, admin, weight, \
    max_running, requests_per_min, tokens_per_min, keys.created_s, expires_s, revoked_s, \
    queue_timeout_s \
    FROM keys JOIN projects ON projects.id = project";

fn key(row: &Row<'_>) -> rusqlite::Result<KeyRow> {
    Ok(KeyRow {
        id: row.get(0)?,
        project: ProjectId(row.get(1)?),
        hash: row.get(4)?,
        hint: row.get(5)?,
        created_s: row.get(11)?,
        revoked_s: row.get(13)?,
        key: NewKey {
            project: row.get(2)?,
            name: row.get(3)?,
            admin: row.get(6)?,
            weight: row.get(7)?,
            max_running: row.get(8)?,
            requests_per_min: row.get(9)?,
            tokens_per_min: row.get(10)?,
            queue_timeout_s: row.get(14)?,
            expires_s: row.get(12)?,
        },
    })
}

impl Tx<'_> {
    /// Adds a key; its project too where that is new. Returns the id.
    pub fn insert_key(
        &self,
        new: &NewKey,
        hash: &[u8; 32],
        hint: &str,
        now_s: u64,
    ) -> Result<i64, StoreError> {
        let sql = "INSERT INTO projects (name, created_s) VALUES (?, ?) ON CONFLICT DO NOTHING";
        self.0.execute(sql, params![new.project, now_s])?;
        let NewKey { name, project, admin, weight, max_running, .. } = new;
        let NewKey { requests_per_min, tokens_per_min, queue_timeout_s, expires_s, .. } = new;
        let sql = "INSERT INTO keys (project, name, hash, hint, admin, weight, max_running, \
                   requests_per_min, tokens_per_min, queue_timeout_s, created_s, expires_s) \
                   VALUES ((SELECT id FROM projects WHERE name = ?), \
                   ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
        let row = params![
            project,
            name,
            hash,
            hint,
            admin,
            weight,
            max_running,
            requests_per_min,
            tokens_per_min,
            queue_timeout_s,
            now_s,
            expires_s
        ];
        self.0.execute(sql, row)?;
        Ok(self.0.last_insert_rowid())
    }

    /// Every key that ever was, oldest first.
    pub fn keys(&self) -> Result<Vec<KeyRow>, StoreError> {
        let mut query = self.0.prepare_cached(&format!("SELECT {COLUMNS} ORDER BY keys.id"))?;
        let rows = query.query_map([], key)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// One of them.
    pub fn key(&self, id: i64) -> Result<Option<KeyRow>, StoreError> {
        let mut query = self.0.prepare_cached(&format!("SELECT {COLUMNS} WHERE keys.id = ?"))?;
        Ok(query.query_row([id], key).optional()?)
    }

    /// Revokes a key. What was revoked stays revoked since then.
    pub fn revoke_key(&self, id: i64, now_s: u64) -> Result<(), StoreError> {
        let sql = "UPDATE keys SET revoked_s = ? WHERE id = ? AND revoked_s IS NULL";
        self.0.execute(sql, params![now_s, id])?;
        Ok(())
    }
}
