//! What was used: one row of sums for each minute, project, key, model and kind of work.
//!
//! Rows only grow, until those of old minutes become rows of days ([`Tx::fold_usage`]). They name
//! keys and projects by number, which outlive both: neither is ever deleted.

use rusqlite::types::Value as Sql;
use rusqlite::{OptionalExtension, Row, params, params_from_iter};

use super::{StoreError, Tx};
use crate::types::ProjectId;

const HOUR_S: u64 = 3600;
const DAY_S: u64 = 24 * HOUR_S;

/// What rows are told apart by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Account {
    /// The beginning of a minute, in seconds of Unix time; of an old day, its first.
    pub minute_s: u64,
    /// Whose.
    pub project: i64,
    /// Number of the key in the table; 0 for whoever came without one of it.
    pub key: i64,
    /// The model that worked.
    pub model: String,
    /// At what.
    pub work: Work,
    /// In a batch.
    pub batch: bool,
    /// Name of the tier.
    pub tier: &'static str,
}

/// What a model did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Text.
    Completions,
    /// Vectors.
    Embeddings,
}

impl Work {
    /// The word is in the database: never change one.
    fn word(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
        }
    }
}

/// Sums. All but the first count tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Requests.
    pub requests: u64,
    /// Of prompts.
    pub input: u64,
    /// Of these, those that were found in the prefix cache.
    pub cached: u64,
    /// Of answers.
    pub output: u64,
}

impl Used {
    /// Both together.
    pub fn add(&mut self, more: Self) {
        self.requests += more.requests;
        self.input += more.input;
        self.cached += more.cached;
        self.output += more.output;
    }
}

/// What sums may be told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words of the API")]
pub enum Group {
    Project,
    Key,
    Model,
    Batch,
    Tier,
}

impl Group {
    fn column(self) -> &'static str {
        match self {
            Self::Project => "(SELECT name FROM projects WHERE id = project)",
            Self::Key => "'key_' || nullif(key, 0)",
            Self::Model => "model",
            Self::Batch => "batch",
            Self::Tier => "tier",
        }
    }
}

/// Which sums.
#[derive(Clone, Debug)]
pub struct UsageQuery {
    /// Of this work,
    pub work: Work,
    /// from this second on,
    pub from_s: u64,
    /// and before this one,
    pub to_s: u64,
    /// in parts of so many seconds, counted from `from_s`.
    pub width_s: u64,
    /// Of this project alone.
    pub only: Option<ProjectId>,
    /// Of projects with these names, unless it is empty;
    pub projects: Vec<String>,
    /// of keys with these numbers,
    pub keys: Vec<i64>,
    /// of these models,
    pub models: Vec<String>,
    /// and in a batch, or not.
    pub batch: Option<bool>,
    /// Told apart by.
    pub groups: Vec<Group>,
}

/// Sums of a part of the time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// When the part begins.
    pub start_s: u64,
    /// Name of the project, where sums are told apart by it; and so on.
    pub project: Option<String>,
    /// As `key_1`. None for whoever came without one, too.
    pub key: Option<String>,
    /// Its id.
    pub model: Option<String>,
    /// In one or not.
    pub batch: Option<bool>,
    /// Its name.
    pub tier: Option<String>,
    /// The sums.
    pub used: Used,
}

const GROUPS: [Group; 5] = [Group::Project, Group::Key, Group::Model, Group::Batch, Group::Tier];

fn row(row: &Row<'_>) -> rusqlite::Result<UsageRow> {
    let used = Used {
        requests: row.get(6)?,
        input: row.get(7)?,
        cached: row.get(8)?,
        output: row.get(9)?,
    };
    Ok(UsageRow {
        start_s: row.get(0)?,
        project: row.get(1)?,
        key: row.get(2)?,
        model: row.get(3)?,
        batch: row.get(4)?,
        tier: row.get(5)?,
        used,
    })
}

impl Tx<'_> {
    /// Adds to the sums of an account.
    pub fn add_usage(&self, account: &Account, used: Used) -> Result<(), StoreError> {
        let sql = "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
                   ON CONFLICT DO UPDATE SET requests = requests + excluded.requests, \
                   input = input + excluded.input, cached = cached + excluded.cached, \
                   output = output + excluded.output";
        let Account { minute_s, project, key, model, work, batch, tier } = account;
        let Used { requests, input, cached, output } = used;
        let work = work.word();
        let row = params![
            minute_s, project, key, model, work, batch, tier, requests, input, cached, output
        ];
        self.0.prepare_cached(sql)?.execute(row)?;
        Ok(())
    }

    /// Adds an hour of minutes, the oldest before `before_s`, to their day: to the row of its first
    /// minute. Sums of whole days stay what they are. False when there is none any more.
    pub fn fold_usage(&self, before_s: u64) -> Result<bool, StoreError> {
        let sql = "SELECT minute_s FROM usage WHERE minute_s < ? AND minute_s % ? != 0 \
                   ORDER BY minute_s LIMIT 1";
        let mut oldest = self.0.prepare_cached(sql)?;
        let minute_s =
            oldest.query_row([before_s, DAY_S], |row| row.get::<_, u64>(0)).optional()?;
        let Some(minute_s) = minute_s else { return Ok(false) };
        let (day_s, end_s) = (minute_s / DAY_S * DAY_S, (minute_s / HOUR_S + 1) * HOUR_S);
        let sql = "INSERT INTO usage SELECT ?1, project, key, model, work, batch, tier, \
                   sum(requests), sum(input), sum(cached), sum(output) FROM usage \
                   WHERE minute_s >= ?2 AND minute_s < ?3 GROUP BY 2, 3, 4, 5, 6, 7 \
                   ON CONFLICT DO UPDATE SET requests = requests + excluded.requests, \
                   input = input + excluded.input, cached = cached + excluded.cached, \
                   output = output + excluded.output";
        self.0.prepare_cached(sql)?.execute(params![day_s, minute_s, end_s])?;
        let sql = "DELETE FROM usage WHERE minute_s >= ? AND minute_s < ?";
        self.0.prepare_cached(sql)?.execute(params![minute_s, end_s])?;
        Ok(true)
    }

    /// Sums by part of the time, oldest first. Parts without any are left out.
    pub fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageRow>, StoreError> {
        let mut values: Vec<Sql> = Vec::new();
        let mut columns =
            format!("(minute_s - {0}) / {1} * {1} + {0}", query.from_s, query.width_s);
        for group in GROUPS {
            let column = if query.groups.contains(&group) { group.column() } else { "NULL" };
            columns = format!("{columns}, {column}");
        }
        let mut rule = "work = ? AND minute_s >= ? AND minute_s < ?".to_owned();
        values.push(query.work.word().to_owned().into());
        values.extend([query.from_s, query.to_s].map(|second| Sql::from(second as i64)));
        let mut among = |column: &str, list: Vec<Sql>| {
            if !list.is_empty() {
                let marks = vec!["?"; list.len()].join(", ");
                rule = format!("{rule} AND {column} IN ({marks})");
                values.extend(list);
            }
        };
        let texts = |list: &[String]| list.iter().cloned().map(Sql::from).collect();
        among("project", query.only.iter().map(|project| project.0.into()).collect());
        among(Group::Project.column(), texts(&query.projects));
        among("key", query.keys.iter().copied().map(Sql::from).collect());
        among("model", texts(&query.models));
        among("batch", query.batch.iter().map(|batch| i64::from(*batch).into()).collect());
        let sql = format!(
            "SELECT {columns}, sum(requests), sum(input), sum(cached), sum(output) FROM usage \
             WHERE {rule} GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6"
        );
        let mut statement = self.0.prepare(&sql)?;
        let rows = statement.query_map(params_from_iter(values), row)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
