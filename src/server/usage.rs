//! `/v1/organization/usage`: who used how many tokens, in OpenAI's words.
//!
//! An admin key sees every project, any other its own alone. Requests count when they end, with
//! what was computed for them, also where nobody read it. Deliberately absent: prices.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::Uri;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Takes;
use super::paging::Query;
use super::reference::{Routes, answers, get};
use super::{App, aside};
use crate::auth::Caller;
use crate::ledger::{Group, UsageQuery, UsageRow, Work};
use crate::types::unix_now_s;

type Answer = Result<Json<Value>, ApiError>;

/// The last second that a query may name: that of the year 9999.
const TIME_MAX: u64 = 253_402_300_799;

/// By name: seconds, buckets of a page unless the query says, and at most.
const WIDTHS: [(&str, u64, u64, u64); 3] =
    [("1d", 86_400, 7, 31), ("1h", 3600, 24, 168), ("1m", 60, 60, 1440)];

const GROUPS: [(&str, Group); 5] = [
    ("project_id", Group::Project),
    ("api_key_id", Group::Key),
    ("model", Group::Model),
    ("batch", Group::Batch),
    ("service_tier", Group::Tier),
];

const TEXTS: Takes = Takes::Each(&Takes::Text);
const QUERY: [(&str, Takes, &str); 10] = [
    ("start_time", Takes::Integer, "The first second; without it, the page ends now."),
    ("end_time", Takes::Integer, "The second that is not counted any more; without it, the next."),
    (
        "bucket_width",
        Takes::Word(&["1m", "1h", "1d"]),
        "Sums of a minute, an hour or a day (UTC). Days that are more than 90 days old are kept as \
         days, and stand in their first minute and hour.",
    ),
    ("project_ids", TEXTS, "Only these projects, by name."),
    ("api_key_ids", TEXTS, "Only these keys: `key_1`."),
    ("user_ids", TEXTS, "Refused: there are keys and no users."),
    ("models", TEXTS, "Only these models."),
    ("group_by", TEXTS, "Tells sums apart by fields that are null otherwise."),
    (
        "limit",
        Takes::Integer,
        "Buckets of a page: 7 of at most 31 days, 24 of 168 hours, 60 of \
                               1440 minutes.",
    ),
    ("page", Takes::Text, "What the page before calls `next_page`."),
];

pub(super) fn routes() -> Routes {
    const GROUP: &str = "Usage";
    let batch = ("batch", Takes::Bool, "Only what ran in a batch, or only what did not.");
    Routes::new()
        .add(
            get("/v1/organization/usage/completions", "usage-completions", GROUP, "Of text.")
                .query(&QUERY)
                .query(&[batch])
                .answers(&answers::USAGE_OF_TEXT),
            completions,
        )
        .add(
            get("/v1/organization/usage/embeddings", "usage-embeddings", GROUP, "Of vectors.")
                .query(&QUERY)
                .answers(&answers::USAGE_OF_VECTORS),
            embeddings,
        )
}

async fn completions(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Answer {
    answer(&app, &caller, &uri, Work::Completions).await
}

async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Answer {
    answer(&app, &caller, &uri, Work::Embeddings).await
}

async fn answer(app: &App, caller: &Caller, uri: &Uri, work: Work) -> Answer {
    let mut query = Query::parse(uri)?;
    let mut asked = asked(&mut query, work, unix_now_s())?;
    query.end(app.config.lenient_fields)?;
    asked.usage.only = (!caller.admin).then_some(caller.project);
    let ledger = Arc::clone(&app.rooms.ledger);
    let turn = app.lists.wait(caller.tenant.key()).await;
    let page = aside(move || {
        let _turn = turn; // a month of minutes is as long as any list
        Ok(page(&asked, &ledger.usage(&asked.usage)?))
    });
    Ok(Json(page.await?))
}

/// One page of buckets.
struct Asked {
    usage: UsageQuery,
    /// The second at which all pages end.
    end_s: u64,
}

fn asked(query: &mut Query, work: Work, now_s: u64) -> Result<Asked, ApiError> {
    let width = query.take("bucket_width").unwrap_or_else(|| "1d".to_owned());
    let known = WIDTHS.iter().find(|(name, ..)| *name == width);
    let &(_, width_s, usual, most) = known.ok_or_else(|| {
        let message = "Invalid 'bucket_width': supported values are: '1m', '1h', '1d'.";
        ApiError::invalid("bucket_width", message)
    })?;
    let limit = number(query, "limit", 1, most)?.unwrap_or(usual);
    let end_s = number(query, "end_time", 0, TIME_MAX)?.unwrap_or(now_s + 1);
    let start_s = number(query, "start_time", 0, TIME_MAX)?;
    let start_s = start_s.unwrap_or(end_s.saturating_sub(1 + (limit - 1) * width_s));
    let first_s = start_s / width_s * width_s;
    let from_s = match query.take("page") {
        None => first_s,
        Some(page) => {
            let place = page.strip_prefix("page_").and_then(|place| place.parse::<u64>().ok());
            let is_one = |at: &u64| (first_s..=TIME_MAX).contains(at) && at.is_multiple_of(width_s);
            place.filter(is_one).ok_or_else(|| {
                let message = "Invalid 'page': expected the 'next_page' of the page before.";
                ApiError::invalid("page", message)
            })?
        }
    };
    if let Some(user) = query.list("user_ids").first() {
        let message = format!("Unsupported parameter: 'user_ids': there is no user '{user}'.");
        return Err(ApiError::unsupported("user_ids", message));
    }
    let batch = match work {
        Work::Completions => batch(query)?,
        Work::Embeddings => None,
    };
    let keys = query.list("api_key_ids");
    // What is no key of the table has no number, and used nothing: it finds nothing.
    let number = |key: &String| key.strip_prefix("key_")?.parse().ok().filter(|id| *id > 0);
    let usage = UsageQuery {
        work,
        from_s,
        to_s: end_s.min(from_s + limit * width_s),
        width_s,
        only: None,
        projects: query.list("project_ids"),
        keys: keys.iter().map(|key| number(key).unwrap_or(-1)).collect(),
        models: query.list("models"),
        batch,
        groups: groups(query, work)?,
    };
    Ok(Asked { usage, end_s })
}

/// What vectors are not told apart by.
fn is_of_text(group: Group) -> bool {
    matches!(group, Group::Batch | Group::Tier)
}

fn groups(query: &mut Query, work: Work) -> Result<Vec<Group>, ApiError> {
    let known = |name: &str| {
        let found = GROUPS.iter().find(|(word, _)| *word == name).map(|(_, group)| *group);
        found.filter(|group| work == Work::Completions || !is_of_text(*group))
    };
    let read = |name: &String| {
        known(name).ok_or_else(|| {
            let message = format!("Invalid value: '{name}'. Sums are not told apart by it.");
            ApiError::invalid("group_by", message)
        })
    };
    query.list("group_by").iter().map(read).collect()
}

fn batch(query: &mut Query) -> Result<Option<bool>, ApiError> {
    match query.take("batch").as_deref() {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(_) => Err(ApiError::invalid("batch", "Invalid 'batch': true or false.")),
    }
}

fn number(query: &mut Query, name: &str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
    let Some(text) = query.take(name) else { return Ok(None) };
    let number = text.parse::<u64>().ok().filter(|number| (low..=high).contains(number));
    let wrong = || {
        let message = format!("Invalid '{name}': expected an integer between {low} and {high}.");
        ApiError::invalid(name, message)
    };
    number.map(Some).ok_or_else(wrong)
}

fn page(asked: &Asked, rows: &[UsageRow]) -> Value {
    let Asked { usage, end_s } = asked;
    let mut rows = rows.iter().peekable(); // in the order of time
    let buckets = (usage.from_s..usage.to_s).step_by(usage.width_s as usize).map(|start_s| {
        let own = std::iter::from_fn(|| rows.next_if(|row| row.start_s == start_s));
        json!({
            "object": "bucket",
            "start_time": start_s,
            "end_time": start_s + usage.width_s,
            "results": own.map(|row| result(row, usage.work)).collect::<Vec<_>>(),
        })
    });
    let has_more = usage.to_s < *end_s;
    json!({
        "object": "page",
        "data": buckets.collect::<Vec<_>>(),
        "has_more": has_more,
        "next_page": has_more.then(|| format!("page_{}", usage.to_s)),
    })
}

fn result(row: &UsageRow, work: Work) -> Value {
    let used = row.used;
    let mut result = match work {
        Work::Completions => json!({
            "object": "organization.usage.completions.result",
            "input_tokens": used.input,
            "input_cached_tokens": used.cached,
            "input_uncached_tokens": used.input - used.cached.min(used.input),
            "output_tokens": used.output,
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
            "batch": row.batch,
            "service_tier": row.tier,
        }),
        Work::Embeddings => json!({
            "object": "organization.usage.embeddings.result",
            "input_tokens": used.input,
        }),
    };
    result["num_model_requests"] = json!(used.requests);
    result["project_id"] = json!(row.project);
    result["user_id"] = Value::Null;
    result["api_key_id"] = json!(row.key);
    result["model"] = json!(row.model);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(query: &str) -> Result<Asked, ApiError> {
        let uri = format!("/v1/organization/usage/completions?{query}").parse().unwrap();
        asked(&mut Query::parse(&uri).unwrap(), Work::Completions, 1_000_000)
    }

    #[test]
    fn buckets_begin_with_their_unit_and_pages_follow_each_other() {
        let asked = ask("start_time=86500&bucket_width=1d&limit=2").unwrap();
        assert_eq!((asked.usage.from_s, asked.usage.to_s), (86_400, 259_200));
        let first = page(&asked, &[]);
        assert_eq!(first["data"].as_array().map(Vec::len), Some(2));
        assert_eq!(
            (&first["has_more"], &first["next_page"]),
            (&json!(true), &json!("page_259200"))
        );
        let asked = ask("start_time=86500&limit=31&page=page_259200").unwrap();
        assert_eq!((asked.usage.from_s, asked.usage.to_s), (259_200, 1_000_001));
        let last = page(&asked, &[]);
        assert_eq!(last["data"].as_array().map(Vec::len), Some(9));
        assert_eq!((&last["has_more"], &last["next_page"]), (&json!(false), &Value::Null));
        // Without a beginning: as many as fit before now.
        let asked = ask("bucket_width=1h&limit=3").unwrap();
        assert_eq!((asked.usage.from_s, asked.usage.to_s), (277 * 3600 - 7200, 1_000_001));
        let none = page(&ask("start_time=5000&end_time=4000&bucket_width=1m").unwrap(), &[]);
        assert_eq!((&none["data"], &none["has_more"]), (&json!([]), &json!(false)));
    }

    #[test]
    fn queries_are_read_and_wrong_ones_refused_by_name() {
        let query = "project_ids[]=a&project_ids[]=b&api_key_ids=key_3&api_key_ids=x&models[]=m\
                     &batch=false&group_by[]=model&group_by[]=api_key_id";
        let usage = ask(query).unwrap().usage;
        assert_eq!((usage.projects.len(), usage.keys), (2, vec![3, -1]));
        assert_eq!((usage.models, usage.batch), (vec!["m".to_owned()], Some(false)));
        assert_eq!(usage.groups, [Group::Model, Group::Key]);
        for (bad, param) in [
            ("start_time=-1", "start_time"),
            ("start_time=now", "start_time"),
            ("end_time=99999999999999", "end_time"),
            ("bucket_width=1w", "bucket_width"),
            ("limit=32", "limit"),
            ("bucket_width=1h&limit=0", "limit"),
            ("start_time=0&page=page_5", "page"),
            ("start_time=0&page=86400", "page"),
            ("start_time=86400&page=page_0", "page"),
            ("user_ids[]=me", "user_ids"),
            ("group_by[]=user_id", "group_by"),
            ("batch=1", "batch"),
        ] {
            let error = ask(bad).err().unwrap();
            assert_eq!(error.param.as_deref(), Some(param), "{bad}");
        }
    }
}
