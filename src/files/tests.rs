//! The files room against its promises: whole or not at all, within the quota, put together right.

use super::*;
use crate::store::NewKey;

const ONE: ProjectId = ProjectId::DEFAULT;

fn files(quota: u64) -> Files {
    let store = Arc::new(Store::in_memory().unwrap());
    Files::open(store, Quota { project_bytes_max: quota }).unwrap()
}

fn new(purpose: &str) -> NewFile {
    NewFile { filename: "a.txt".into(), purpose: purpose.into(), lifetime_s: None }
}

fn written(files: &Files, text: &str) -> Writing {
    let mut content = files.write(1 << 20).unwrap();
    text.as_bytes().chunks(3).for_each(|piece| content.push(piece).unwrap());
    content
}

fn keep(files: &Files, id: &str, text: &str) -> Result<Value, Error> {
    files.keep(ONE, id, &new("batch"), written(files, text))
}

fn read(files: &Files, id: &str) -> String {
    std::io::read_to_string(files.content(ONE, id).unwrap().1).unwrap()
}

fn on_disk(files: &Files) -> usize {
    std::fs::read_dir(files.blobs.folder()).unwrap().count()
}

fn page() -> Page {
    Page { after: None, before: None, limit: 9, descending: true }
}

#[test]
fn a_file_comes_back_as_it_was_and_goes_whole() {
    let files = files(100);
    let object = keep(&files, "file-1", "hello").unwrap();
    assert_eq!((&object["bytes"], &object["filename"]), (&json!(5), &json!("a.txt")));
    let sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    assert_eq!(object["sha256"], sha);
    assert_eq!(files.get(ONE, "file-1").unwrap(), object);
    assert_eq!(read(&files, "file-1"), "hello");
    files.delete(ONE, "file-1").unwrap();
    assert_eq!(on_disk(&files), 0);
    assert!(matches!(files.delete(ONE, "file-1"), Err(Error::NotFound { .. })));
    assert!(matches!(files.content(ONE, "../hearth.db"), Err(Error::NotFound { .. })));
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let files = files(100);
    drop(written(&files, "never kept"));
    let mut long = files.write(4).unwrap();
    long.push(b"1234").unwrap();
    assert!(matches!(long.push(b"5"), Err(Error::TooLarge { code: "file_too_large", .. })));
    drop(long);
    assert_eq!(on_disk(&files), 0);
}

/// A power cut in the middle of uploads, once a lesson, fills no disk.
#[test]
fn what_a_killed_process_left_unfinished_is_removed_at_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let open = || {
        let store = Arc::new(Store::open(folder.path()).unwrap());
        Files::open(store, Quota { project_bytes_max: 100 }).unwrap()
    };
    let files = open();
    keep(&files, "file-1", "hello").unwrap();
    let writing = written(&files, "half");
    assert_eq!(on_disk(&open()), 2, "another process may be writing it");
    std::mem::forget(writing);
    drop(files);
    let files = open();
    assert_eq!((on_disk(&files), &*read(&files, "file-1")), (1, "hello"));
}

#[test]
fn a_project_has_so_much_room_and_no_more() {
    let files = files(10);
    keep(&files, "file-1", "12345").unwrap();
    let full = keep(&files, "file-2", "123456").unwrap_err();
    assert!(matches!(full, Error::TooLarge { code: "storage_quota_exceeded", .. }));
    assert_eq!(on_disk(&files), 1);
    keep(&files, "file-3", "12345").unwrap();
    files.delete(ONE, "file-1").unwrap();
    keep(&files, "file-4", "1234").unwrap();
}

#[test]
fn lists_are_by_purpose_and_projects_apart() {
    let files = files(100);
    keep(&files, "file-1", "x").unwrap();
    files.keep(ONE, "file-2", &new("vision"), written(&files, "x")).unwrap();
    let ids = |project, purpose| -> Vec<String> {
        let list = files.list(project, purpose, &page()).unwrap();
        list.documents.into_iter().map(|document| document.id).collect()
    };
    assert_eq!(ids(ONE, None), ["file-2", "file-1"]);
    assert_eq!(ids(ONE, Some("batch")), ["file-1"]);
    let key = NewKey::named("k", "other");
    let other = files.store.write(|tx| {
        let id = tx.insert_key(&key, &[0; 32], "", 1)?;
        tx.key(id)
    });
    let other = other.unwrap().unwrap().project;
    assert!(ids(other, None).is_empty());
    assert!(files.content(other, "file-1").is_err() && files.delete(other, "file-1").is_err());
}

#[test]
fn an_expired_file_is_not_there() {
    let files = files(100);
    let soon = NewFile { lifetime_s: Some(1), ..new("batch") };
    let object = files.keep(ONE, "file-1", &soon, written(&files, "x")).unwrap();
    assert_eq!(object["expires_at"].as_u64(), object["created_at"].as_u64().map(|at| at + 1));
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert!(files.get(ONE, "file-1").is_err());
    assert_eq!(files.store.gc().unwrap().documents, 1);
    // Too young to be nobody's.
    assert_eq!(files.gc().unwrap(), 0);
    let blob = std::fs::File::open(files.blobs.folder().join("file-1")).unwrap();
    blob.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!((files.gc().unwrap(), on_disk(&files)), (1, 0));
}

fn begin(files: &Files, bytes: u64) {
    let new = NewUpload { file: new("batch"), bytes, mime_type: "text/plain".into() };
    let upload = files.begin_upload(ONE, "upload_1", &new).unwrap();
    assert_eq!((&upload["status"], &upload["file"]), (&json!("pending"), &Value::Null));
}

fn part(files: &Files, id: &str, text: &str) -> Result<Value, Error> {
    files.add_part(ONE, "upload_1", id, written(files, text))
}

fn complete(files: &Files, parts: &[&str], md5: Option<&str>) -> Result<Value, Error> {
    let parts: Vec<_> = parts.iter().map(|&part| part.to_owned()).collect();
    files.complete_upload(ONE, "upload_1", &parts, md5, "file-1")
}

#[test]
fn parts_are_put_together_in_the_order_that_the_client_says() {
    let files = files(11);
    begin(&files, 11);
    part(&files, "part_2", "world").unwrap();
    part(&files, "part_1", "hello ").unwrap();
    let md5 = "5EB63BBBE01EEED093CB22BB8F5ACDC3";
    for (parts, md5, param) in [
        (&["part_1"][..], None, "part_ids"),
        (&["part_1", "part_2", "part_1"], None, "part_ids[2]"),
        (&["part_1", "part_3"], None, "part_ids[1]"),
        (&["part_2", "part_1"], Some(md5), "md5"),
    ] {
        let Err(Error::InvalidValue { param: blamed, .. }) = complete(&files, parts, md5) else {
            panic!("{parts:?} passed");
        };
        assert_eq!(blamed, param);
    }
    let done = complete(&files, &["part_1", "part_2"], Some(md5)).unwrap();
    assert_eq!((&done["status"], &done["file"]["id"]), (&json!("completed"), &json!("file-1")));
    assert_eq!(read(&files, "file-1"), "hello world");
    assert_eq!(on_disk(&files), 1);
    // And that was it.
    assert!(part(&files, "part_4", "x").is_err());
    assert!(complete(&files, &["part_1", "part_2"], None).is_err());
    assert!(files.cancel_upload(ONE, "upload_1").is_err());
    assert_eq!(on_disk(&files), 1);
}

#[test]
fn a_cancelled_upload_leaves_nothing() {
    let files = files(100);
    begin(&files, 5);
    part(&files, "part_1", "12345").unwrap();
    assert_eq!(files.cancel_upload(ONE, "upload_1").unwrap()["status"], "cancelled");
    assert_eq!(on_disk(&files), 0);
    assert!(part(&files, "part_2", "x").is_err() && files.check_upload(ONE, "upload_1").is_err());
    assert_eq!(on_disk(&files), 0);
}

#[test]
#[cfg(unix)]
fn a_temporary_folder_is_new_and_this_user_s_alone() {
    use std::os::unix::fs::PermissionsExt;
    let all = [(); 3].map(|()| super::blobs::Blobs::open(None).unwrap());
    for blobs in &all {
        let mode = std::fs::metadata(blobs.folder()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(std::fs::read_dir(blobs.folder()).unwrap().count(), 0);
    }
    assert!(all[0].folder() != all[1].folder() && all[1].folder() != all[2].folder());
    let gone = all[0].folder().to_owned();
    drop(all);
    assert!(!gone.exists());
}
