//! Lists: the query that asks for a part of one, and the object that carries it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::http::Uri;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::{App, aside, fields};
use crate::auth::Caller;
use crate::error::Error;
use crate::history::{Listing, Page};

/// The parameters of a URL that are not read yet.
pub(super) struct Query {
    pairs: VecDeque<(String, String)>,
}

impl Query {
    pub(super) fn parse(uri: &Uri) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<VecDeque<(String, String)>>::try_from_uri(uri);
        let query = query.map_err(|e| ApiError::invalid("query", e.body_text()))?;
        Ok(Self { pairs: query.0 })
    }

    /// The last value of a name, as a form would have it.
    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        let mut found = None;
        self.pairs.retain(|(key, value)| {
            let hit = key == name;
            if hit {
                found = Some(value.clone());
            }
            !hit
        });
        found.filter(|value| !value.is_empty())
    }

    /// Every value of a list.
    pub(super) fn list(&mut self, name: &str) -> Vec<String> {
        let is_item = |key: &str| {
            let index = key.strip_prefix(name).map(|rest| rest.trim_matches(['[', ']']));
            index.is_some_and(|index| index.bytes().all(|b| b.is_ascii_digit()))
        };
        let (items, rest): (VecDeque<_>, _) =
            self.pairs.drain(..).partition(|(key, _)| is_item(key));
        self.pairs = rest;
        items.into_iter().map(|(_, value)| value).collect()
    }

    /// The members of an object: `name[key]=value`.
    pub(super) fn object(&mut self, name: &str) -> Vec<(String, String)> {
        let member = |key: &str| {
            let key = key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?;
            Some(key.to_owned())
        };
        let mut members = Vec::new();
        self.pairs.retain(|(key, value)| match member(key) {
            Some(key) => {
                members.push((key, value.clone()));
                false
            }
            None => true,
        });
        members
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(ApiError::invalid(name, format!("Invalid '{name}': true or false."))),
        }
    }

    /// `after`, `limit` and `order`.
    fn page(&mut self, rule: PageRule) -> Result<Page, ApiError> {
        let PageRule { limit, max, descending } = rule;
        let limit = match self.take("limit").map(|text| text.parse::<usize>()) {
            None => limit,
            Some(Ok(limit)) if (1..=max).contains(&limit) => limit,
            Some(_) => {
                let message = format!("Invalid 'limit': expected an integer between 1 and {max}.");
                return Err(ApiError::invalid("limit", message));
            }
        };
        let descending = match self.take("order").as_deref() {
            None => descending,
            Some("asc") => false,
            Some("desc") => true,
            Some(_) => {
                let message = "Invalid 'order': supported values are: 'asc', 'desc'.";
                return Err(ApiError::invalid("order", message));
            }
        };
        Ok(Page { after: self.take("after"), before: None, limit, descending })
    }

    /// What is left is unknown.
    pub(super) fn end(self, lenient: bool) -> Result<(), ApiError> {
        self.pairs.iter().try_for_each(|(name, _)| fields::unknown(name, lenient))
    }
}

/// The defaults of a list, which differ by what it lists.
#[derive(Clone, Copy)]
pub(super) struct PageRule {
    pub limit: usize,
    pub max: usize,
    pub descending: bool,
}

impl PageRule {
    /// 20 of at most 100, oldest first.
    pub(super) const ASCENDING: Self = Self { limit: 20, max: 100, descending: false };
}

/// Answers with a part of a list. Of the query everything else is read already.
pub(super) async fn answer(
    app: &App,
    caller: &Caller,
    mut query: Query,
    rule: PageRule,
    list: impl FnOnce(&Page) -> Result<Listing, Error> + Send + 'static,
) -> Result<Json<Value>, ApiError> {
    let page = query.page(rule)?;
    query.end(app.config.lenient_fields)?;
    let turn = app.lists.wait(caller.tenant.key()).await;
    let listing = aside(move || {
        let _turn = turn; // kept to the end even when the client goes away before
        list(&page)
    });
    Ok(Json(object(listing.await?)))
}

/// Lists are made one after the other, since one of them may look at everything that is stored;
/// keys take turns, whoever asks for many at once.
pub(super) struct Turns {
    all: Arc<Semaphore>,
    keys: Mutex<HashMap<u64, Arc<Semaphore>>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(1)), keys: Mutex::default() }
    }
}

impl Turns {
    /// Waits until it is the turn of a key, which lasts until the permits are dropped.
    pub(super) async fn wait(&self, key: u64) -> [Option<OwnedSemaphorePermit>; 2] {
        let own = {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(keys.entry(key).or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        // Neither is ever closed.
        let own = own.acquire_owned().await.ok();
        [own, Arc::clone(&self.all).acquire_owned().await.ok()]
    }
}

/// A list object.
fn object(listing: Listing) -> Value {
    let Listing { documents, has_more } = listing;
    json!({
        "object": "list",
        "first_id": documents.first().map(|document| &document.id),
        "last_id": documents.last().map(|document| &document.id),
        "has_more": has_more,
        "data": documents.iter().map(|document| &document.body).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn query(text: &str) -> Query {
        Query::parse(&format!("/v1/x?{text}").parse().unwrap()).unwrap()
    }

    #[test]
    fn lists_and_objects_come_in_brackets_or_not() {
        let mut q = query("include[]=a&include=b&include%5B7%5D=c&includes=x&metadata[k%5D=v%20w");
        assert_eq!(q.list("include"), ["a", "b", "c"]);
        assert_eq!(q.object("metadata"), [("k".to_owned(), "v w".to_owned())]);
        assert_eq!(q.end(false).unwrap_err().param.as_deref(), Some("includes"));
        assert!(query("x=1").end(true).is_ok());
    }

    #[test]
    fn lists_are_made_one_at_a_time_and_keys_take_turns() {
        type Turn = [Option<OwnedSemaphorePermit>; 2];
        fn look<F: Future<Output = Turn>>(turn: &mut Pin<&mut F>) -> Option<Turn> {
            match turn.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(turn) => Some(turn),
                Poll::Pending => None,
            }
        }
        let turns = Turns::default();
        let mut first = pin!(turns.wait(1));
        let first = look(&mut first).expect("nobody else is here");
        let (mut second, mut third) = (pin!(turns.wait(1)), pin!(turns.wait(1)));
        assert!(look(&mut second).is_none() && look(&mut third).is_none());
        let mut other = pin!(turns.wait(2));
        assert!(look(&mut other).is_none(), "one at a time");
        drop(first);
        assert!(look(&mut second).is_none(), "the other waits for the first turn of its key");
        let other = look(&mut other).expect("its turn");
        assert!(look(&mut second).is_none() && look(&mut third).is_none());
        drop(other);
        let second = look(&mut second).expect("its turn");
        assert!(look(&mut third).is_none());
        drop(second);
        assert!(look(&mut third).is_some());
    }

    #[test]
    fn pages_have_defaults_and_bounds() {
        let read = |text: &str| query(text).page(PageRule::ASCENDING);
        let page = read("").unwrap();
        assert_eq!((page.limit, page.descending, page.after), (20, false, None));
        let page = read("limit=100&order=desc&after=x").unwrap();
        assert_eq!((page.limit, page.descending, page.after.as_deref()), (100, true, Some("x")));
        for (bad, param) in [
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=-1", "limit"),
            ("limit=ten", "limit"),
            ("order=up", "order"),
        ] {
            assert_eq!(read(bad).unwrap_err().param.as_deref(), Some(param), "{bad}");
        }
    }
}
