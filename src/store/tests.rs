//! The store against its promises: order, isolation, migrations, refusals, copies.

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::types::ProjectId;

const ONE: ProjectId = ProjectId::DEFAULT;
const KIND: Kind = Kind::Completion;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn document(id: &str, parent: &str) -> Document {
    let body = json!({"id": id, "model": "m", "metadata": {"who": id, "a\"b": "c"}});
    Document { id: id.into(), parent: parent.into(), created_s: 7, expires_s: None, body }
}

fn put(store: &Store, document: &Document) -> Result<(), StoreError> {
    store.write(|tx| tx.insert(ONE, KIND, document))
}

fn ids(store: &Store, page: &Page, matches: &[Match]) -> (Vec<String>, bool) {
    let list = store.read(|tx| tx.list(ONE, KIND, "", matches, page)).unwrap();
    (list.documents.into_iter().map(|d| d.id).collect(), list.has_more)
}

fn page(limit: usize, descending: bool) -> Page {
    Page { after: None, before: None, limit, descending }
}

fn key(name: &str, project: &str) -> NewKey {
    let (max_running, tokens_per_min, expires_s) = (Some(3), Some(9), Some(5));
    let (queue_timeout_s, key) = (Some(7), NewKey::named(name, project));
    NewKey { weight: 2, max_running, tokens_per_min, queue_timeout_s, expires_s, ..key }
}

#[test]
fn what_was_written_is_there_after_opening_again() {
    let folder = folder();
    let inside = folder.path().join("new/folder");
    let one = document("a", "");
    put(&Store::open(&inside).unwrap(), &one).unwrap();
    let store = Store::open(&inside).unwrap();
    assert_eq!(store.read(|tx| tx.get(ONE, KIND, "", "a")).unwrap(), Some(one));
    assert_eq!(store.folder(), Some(&*inside));
}

#[test]
fn a_child_with_the_name_of_a_parent_takes_nobody_along() {
    let store = Store::in_memory().unwrap();
    for (id, parent) in [("one", ""), ("two", ""), ("mine", "two"), ("two", "one")] {
        put(&store, &document(id, parent)).unwrap();
    }
    assert!(store.write(|tx| tx.delete(ONE, KIND, "one", "two")).unwrap());
    let is_there =
        |parent: &str, id: &str| store.read(|tx| tx.get(ONE, KIND, parent, id)).unwrap().is_some();
    assert!(is_there("", "two") && is_there("two", "mine") && !is_there("one", "two"));
    assert!(store.write(|tx| tx.delete(ONE, KIND, "", "two")).unwrap());
    assert!(!is_there("two", "mine"));
}

#[test]
fn a_commit_is_flushed_and_logged() {
    let folder = folder();
    let store = Store::open(folder.path()).unwrap();
    for connection in [&store.writer, store.reader.as_ref().unwrap()] {
        let connection = hold(connection);
        let mode: String =
            connection.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
        let synchronous: i64 =
            connection.query_row("PRAGMA synchronous", [], |row| row.get(0)).unwrap();
        assert_eq!((mode.as_str(), synchronous), ("wal", 2));
    }
}

#[test]
fn pages_follow_each_other_in_both_directions() {
    let store = Store::in_memory().unwrap();
    for id in ["a", "b", "c", "d", "e"] {
        put(&store, &document(id, "")).unwrap();
    }
    for descending in [false, true] {
        let mut seen = Vec::new();
        let mut next = page(2, descending);
        loop {
            let (ids, more) = ids(&store, &next, &[]);
            next.after = ids.last().cloned();
            seen.extend(ids);
            if !more {
                break;
            }
        }
        let mut expected = ["a", "b", "c", "d", "e"];
        if descending {
            expected.reverse();
        }
        assert_eq!(seen, expected);
    }
    let before = |id: &str, descending| Page { before: Some(id.into()), ..page(2, descending) };
    assert_eq!(ids(&store, &before("d", false), &[]), (vec!["b".into(), "c".into()], true));
    assert_eq!(ids(&store, &before("c", true), &[]), (vec!["e".into(), "d".into()], false));
    let lost = Page { after: Some("x".into()), ..page(2, false) };
    let error = store.read(|tx| tx.list(ONE, KIND, "", &[], &lost)).unwrap_err();
    assert!(matches!(error, StoreError::NoSuchCursor(id) if id == "x"));
}

#[test]
fn filters_look_into_the_objects_and_quotes_are_only_letters() {
    let store = Store::in_memory().unwrap();
    put(&store, &document("a", "")).unwrap();
    put(&store, &document("b", "")).unwrap();
    let is = |path, key: &str, value: &str| Match { path, key: key.into(), value: value.into() };
    let found = |matches: &[Match]| ids(&store, &page(9, false), matches).0;
    assert_eq!(found(&[is("$", "model", "m")]), ["a", "b"]);
    assert_eq!(found(&[is("$.metadata", "who", "b"), is("$", "model", "m")]), ["b"]);
    assert_eq!(found(&[is("$.metadata", "a\"b", "c"), is("$.metadata", "who", "a")]), ["a"]);
    assert!(found(&[is("$.metadata", "who' OR 1 = 1 --", "a")]).is_empty());
    assert!(found(&[is("$.metadata", "who", "x")]).is_empty());
}

#[test]
fn projects_do_not_see_each_other() {
    let store = Store::in_memory().unwrap();
    let id = store.write(|tx| tx.insert_key(&key("k", "other"), &[0; 32], "", 1)).unwrap();
    let other = store.read(|tx| tx.key(id)).unwrap().unwrap().project;
    assert_ne!(other, ONE);
    put(&store, &document("a", "")).unwrap();
    let theirs: Result<_, StoreError> = store.write(|tx| {
        assert_eq!(tx.get(other, KIND, "", "a")?, None);
        assert!(!tx.replace(other, KIND, &document("a", ""))?);
        assert!(!tx.delete(other, KIND, "", "a")?);
        tx.list(other, KIND, "", &[], &page(9, false))
    });
    assert!(theirs.unwrap().documents.is_empty());
    assert_eq!(ids(&store, &page(9, false), &[]).0, ["a"]);
}

#[test]
fn children_go_with_their_parent_and_a_failed_transaction_leaves_nothing() {
    let store = Store::in_memory().unwrap();
    put(&store, &document("a", "")).unwrap();
    put(&store, &document("0", "a")).unwrap();
    let failed: Result<(), StoreError> = store.write(|tx| {
        tx.delete(ONE, KIND, "", "a")?;
        Err(StoreError::Busy)
    });
    assert!(failed.is_err());
    assert!(store.read(|tx| tx.get(ONE, KIND, "a", "0")).unwrap().is_some());
    assert!(store.write(|tx| tx.delete(ONE, KIND, "", "a")).unwrap());
    assert_eq!(store.read(|tx| tx.get(ONE, KIND, "a", "0")).unwrap(), None);
    assert!(put(&store, &document("b", "")).is_ok() && put(&store, &document("b", "")).is_err());
}

#[test]
fn what_has_expired_is_gone_at_once_and_collected_later() {
    let store = Store::in_memory().unwrap();
    put(&store, &Document { expires_s: Some(1), ..document("old", "") }).unwrap();
    put(&store, &document("0", "old")).unwrap();
    put(&store, &Document { expires_s: Some(u32::MAX.into()), ..document("new", "") }).unwrap();
    assert_eq!(store.read(|tx| tx.get(ONE, KIND, "", "old")).unwrap(), None);
    assert_eq!(ids(&store, &page(9, false), &[]).0, ["new"]);
    assert_eq!(store.gc().unwrap().documents, 2);
    assert_eq!(store.gc().unwrap().documents, 0);
    assert_eq!(ids(&store, &page(9, false), &[]).0, ["new"]);
}

#[test]
fn what_has_expired_is_swept_a_little_at_a_time() {
    let store = Store::in_memory().unwrap();
    let over = |id: &str, parent: &str| Document { expires_s: Some(1), ..document(id, parent) };
    for one in [over("a", ""), over("0", "a"), document("1", "a"), document("b", "")] {
        put(&store, &one).unwrap();
    }
    let later = u32::MAX.into();
    put(&store, &Document { expires_s: Some(later), ..document("c", "") }).unwrap();
    let file = |tx: &Tx<'_>| tx.insert(ONE, Kind::File, &over("file-1", ""));
    store.write(file).unwrap();
    // The first of them takes along what has no end of its own.
    let swept = [1, 1, 9, 9].map(|most| store.sweep(most).unwrap());
    assert_eq!(swept.each_ref().map(|swept| swept.documents), [2, 1, 1, 0]);
    assert_eq!(swept.map(|swept| swept.contents).concat(), ["file-1"]);
    assert_eq!(ids(&store, &page(9, false), &[]).0, ["b", "c"]);
    assert_eq!(store.gc().unwrap().documents, 0);
    store.write(|tx| tx.prolong(ONE, KIND, "c", Some(1))).unwrap();
    assert_eq!(store.sweep(9).unwrap().documents, 1);
}

#[test]
fn keys_are_kept_whole_and_revoked_once() {
    let store = Store::in_memory().unwrap();
    let new = key("k", "class");
    let id = store.write(|tx| tx.insert_key(&new, &[7; 32], "wxyz", 3)).unwrap();
    let row = store.read(|tx| tx.key(id)).unwrap().unwrap();
    assert_eq!((&row.key, row.hash, row.hint.as_str()), (&new, [7; 32], "wxyz"));
    for now_s in [11, 12] {
        store.write(|tx| tx.revoke_key(id, now_s)).unwrap();
    }
    let rows = store.read(|tx| tx.keys()).unwrap();
    assert_eq!(rows, [KeyRow { revoked_s: Some(11), ..row }]);
}

#[test]
fn two_stores_on_one_folder_see_each_other() {
    let folder = folder();
    let (a, b) = (Store::open(folder.path()).unwrap(), Store::open(folder.path()).unwrap());
    assert!(a.was_alone() && !b.was_alone());
    std::thread::scope(|scope| {
        for (store, name) in [(&a, "a"), (&b, "b")] {
            scope.spawn(move || {
                for i in 0..50 {
                    put(store, &document(&format!("{name}{i}"), "")).unwrap();
                }
            });
        }
    });
    assert_eq!(ids(&a, &page(200, false), &[]).0.len(), 100);
    assert_eq!(ids(&a, &page(200, true), &[]), ids(&b, &page(200, true), &[]));
}

/// Work that was left is taken up by the first server, whatever command looks in meanwhile: a
/// backup may take as long as it likes. Nobody is turned away because somebody else starts.
#[test]
fn commands_do_not_count_and_of_servers_that_start_together_one_is_first() {
    let folder = folder();
    let command = Store::visit(folder.path()).unwrap();
    let server = Store::open(folder.path()).unwrap();
    assert!(server.was_alone() && !command.was_alone());
    let second = Store::open(folder.path()).unwrap();
    drop(server);
    assert!(!second.was_alone() && !Store::open(folder.path()).unwrap().was_alone());
    drop((second, command));
    for _ in 0..50 {
        let start = std::sync::Barrier::new(6);
        let open = |i: usize| {
            start.wait();
            let open = if i.is_multiple_of(2) { Store::visit } else { Store::open };
            open(folder.path()).unwrap()
        };
        let open = &open;
        let stores: Vec<Store> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..6).map(|i| scope.spawn(move || open(i))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(stores.iter().filter(|store| store.was_alone()).count(), 1);
    }
}

#[test]
fn a_database_in_the_place_of_another_is_told_from_it() {
    let folder = folder();
    let identity = || Store::open(folder.path()).unwrap().identity().unwrap();
    let first = identity();
    assert_eq!((first.len(), identity()), (32, first.clone()));
    // As databases were before they had one.
    let path = folder.path().join(DATABASE);
    let old = Connection::open(&path).unwrap();
    let later = "DROP TABLE identity; DROP TABLE usage; ALTER TABLE keys DROP COLUMN \
                 queue_timeout_s; PRAGMA user_version = 1";
    old.execute_batch(later).unwrap();
    drop(old);
    let given = identity();
    assert_ne!(given, first);
    assert_eq!(identity(), given);
    fs::remove_dir_all(folder.path()).unwrap();
    assert_ne!(identity(), given);
    assert_ne!(Store::in_memory().unwrap().identity().unwrap(), given);
}

#[test]
fn databases_that_are_not_ours_are_refused_and_left_alone() {
    let folder = folder();
    let path = folder.path().join(DATABASE);
    let refused_with = |word: &str| {
        let before = fs::read(&path).unwrap();
        let error = Store::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains(DATABASE), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before);
    };
    fs::write(&path, "not a database, whatever its name says: ".repeat(40)).unwrap();
    refused_with("cannot be opened as a database");
    fs::remove_file(&path).unwrap();
    let foreign = Connection::open(&path).unwrap();
    foreign.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE recipes (x)").unwrap();
    drop(foreign);
    refused_with("another program");
    fs::remove_file(&path).unwrap();
    drop(Store::open(folder.path()).unwrap());
    let newer = Connection::open(&path).unwrap();
    newer.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(newer);
    refused_with("newer hearth (schema 99");
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = folder();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Store::open(&file.join("data")).unwrap_err().to_string();
    assert!(error.contains("file/data") && error.contains("--data-dir"), "{error}");
}

#[test]
fn a_backup_comes_back_and_keeps_what_it_replaces() {
    let (data, copy) = (folder(), folder());
    let store = Store::open(data.path()).unwrap();
    put(&store, &document("a", "")).unwrap();
    let to = copy.path().join("backup");
    backup(&store, &to).unwrap();
    assert!(backup(&store, &to).unwrap_err().to_string().contains("not empty"));
    put(&store, &document("b", "")).unwrap();
    let busy = restore(&to, data.path()).unwrap_err().to_string();
    assert!(busy.contains("in use"), "{busy}");
    drop(store);
    restore(&to, data.path()).unwrap();
    let store = Store::open(data.path()).unwrap();
    assert_eq!(ids(&store, &page(9, false), &[]).0, ["a"]);
    let old = Connection::open(data.path().join("hearth.db.before-restore")).unwrap();
    let count: i64 = old.query_row("SELECT count(*) FROM documents", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 2);
    assert!(restore(copy.path(), data.path()).is_err());
}
