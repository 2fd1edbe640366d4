//! Large files in parts: begun, sent in any order, put together in the order that the client says.

use std::io::Read;

use serde_json::{Value, json};

use super::md5::Md5;
use super::{Files, NewFile, Writing, document};
use crate::error::Error;
use crate::store::{Document, Kind, Tx};
use crate::types::{ProjectId, unix_now_s};

/// An upload takes no part after this.
const LIFETIME_S: u64 = 3600;
/// Bytes of one part.
pub const PART_BYTES_MAX: u64 = 64 << 20;
/// Bytes of all parts.
pub const UPLOAD_BYTES_MAX: u64 = 8 << 30;
/// Contents are copied in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// A file that will come in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewUpload {
    /// The file to be.
    pub file: NewFile,
    /// Its length, known in advance.
    pub bytes: u64,
    /// What the client says that it is.
    pub mime_type: String,
}

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "upload", id: id.to_owned() }
}

impl Files {
    /// Begins an upload. Returns the `upload` object.
    pub fn begin_upload(
        &self,
        project: ProjectId,
        id: &str,
        new: &NewUpload,
    ) -> Result<Value, Error> {
        let now_s = unix_now_s();
        let body = json!({
            "id": id,
            "object": "upload",
            "bytes": new.bytes,
            "created_at": now_s,
            "filename": new.file.filename,
            "purpose": new.file.purpose,
            "status": "pending",
            "expires_at": now_s + LIFETIME_S,
            "file": null,
            "mime_type": new.mime_type,
            "file_lifetime_s": new.file.lifetime_s,
        });
        let (id, parent) = (id.to_owned(), String::new());
        let document = Document { id, parent, created_s: now_s, expires_s: None, body };
        self.store.write(|tx| {
            self.check_room(tx, project, new.bytes)?;
            tx.insert(project, Kind::Upload, &document).map_err(Error::from)
        })?;
        Ok(shown(document.body))
    }

    /// Says whether an upload still takes parts, before one is read.
    pub fn check_upload(&self, project: ProjectId, upload: &str) -> Result<(), Error> {
        self.store.read(|tx| pending(tx, project, upload)).map(drop)
    }

    /// Adds a part. Returns the `upload.part` object.
    pub fn add_part(
        &self,
        project: ProjectId,
        upload: &str,
        id: &str,
        content: Writing,
    ) -> Result<Value, Error> {
        let (bytes, _) = content.finish(id)?;
        let created_s = unix_now_s();
        let mut body = json!({"id": id, "object": "upload.part", "created_at": created_s,
                              "upload_id": upload, "bytes": bytes});
        let added = self.store.write(|tx| {
            let expires_s = pending(tx, project, upload)?.body["expires_at"].as_u64();
            self.check_room(tx, project, bytes)?;
            let (id, parent, body) = (id.to_owned(), upload.to_owned(), body.clone());
            let part = Document { id, parent, created_s, expires_s, body };
            tx.insert(project, Kind::UploadPart, &part).map_err(Error::from)
        });
        if added.is_err() {
            self.blobs.remove(id);
        }
        added?;
        body.as_object_mut().map(|part| part.remove("bytes"));
        Ok(body)
    }

    /// Puts the parts together, in this order, as the file `file_id`. Returns the `upload` object.
    ///
    /// # Errors
    /// A part is unknown or named twice, or the whole has not the length or the checksum that the
    /// client promised.
    pub fn complete_upload(
        &self,
        project: ProjectId,
        upload: &str,
        part_ids: &[String],
        md5: Option<&str>,
        file_id: &str,
    ) -> Result<Value, Error> {
        let body = self.store.read(|tx| pending(tx, project, upload))?.body;
        let content = self.join(project, upload, part_ids, md5, &body)?;
        let word = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        let lifetime_s = body["file_lifetime_s"].as_u64();
        let new = NewFile { filename: word("filename"), purpose: word("purpose"), lifetime_s };
        let file = document(file_id, &new, content)?;
        let done = self.store.write(|tx| {
            let mut document = pending(tx, project, upload)?;
            // The whole takes the room of its parts.
            let removed = tx.delete_children(project, Kind::UploadPart, upload)?;
            self.check_room(tx, project, file.body["bytes"].as_u64().unwrap_or_default())?;
            document.body["status"] = "completed".into();
            document.body["file"] = file.body.clone();
            tx.replace(project, Kind::Upload, &document)?;
            tx.insert(project, Kind::File, &file)?;
            Ok::<_, Error>((document.body, removed))
        });
        let (body, removed) = done.inspect_err(|_| self.blobs.remove(file_id))?;
        removed.iter().for_each(|part| self.blobs.remove(part));
        Ok(shown(body))
    }

    /// Gives an upload up. Returns the `upload` object.
    pub fn cancel_upload(&self, project: ProjectId, upload: &str) -> Result<Value, Error> {
        let (body, removed) = self.store.write(|tx| {
            let mut document = pending(tx, project, upload)?;
            document.body["status"] = "cancelled".into();
            tx.replace(project, Kind::Upload, &document)?;
            let removed = tx.delete_children(project, Kind::UploadPart, upload)?;
            Ok::<_, Error>((document.body, removed))
        })?;
        removed.iter().for_each(|part| self.blobs.remove(part));
        Ok(shown(body))
    }

    fn join(
        &self,
        project: ProjectId,
        upload: &str,
        part_ids: &[String],
        md5: Option<&str>,
        body: &Value,
    ) -> Result<Writing, Error> {
        let promised = body["bytes"].as_u64().unwrap_or_default();
        let mut whole = self.blobs.begin(promised)?;
        let mut sum = Md5::new();
        let mut piece = vec![0; PIECE];
        for (i, part) in part_ids.iter().enumerate() {
            let known = self.store.read(|tx| tx.get(project, Kind::UploadPart, upload, part))?;
            if known.is_none() || part_ids[..i].contains(part) {
                let param = format!("part_ids[{i}]");
                let message = format!("Invalid '{param}': '{part}' is not another part of it.");
                return Err(Error::invalid(param, message));
            }
            let mut content = self.blobs.read(part)?;
            loop {
                let got = content.read(&mut piece).map_err(|e| Error::Internal(e.to_string()))?;
                if got == 0 {
                    break;
                }
                sum.update(&piece[..got]);
                // Longer than promised is no matter of limits here.
                whole.push(&piece[..got]).map_err(|error| match error {
                    Error::TooLarge { .. } => wrong_length(promised),
                    other => other,
                })?;
            }
        }
        if whole.bytes() != promised {
            return Err(wrong_length(promised));
        }
        let sum = sum.finish();
        if md5.is_some_and(|wanted| !wanted.eq_ignore_ascii_case(&sum)) {
            let message = format!("Invalid 'md5': the parts together have the checksum {sum}.");
            return Err(Error::invalid("md5", message));
        }
        Ok(whole)
    }
}

fn wrong_length(promised: u64) -> Error {
    let message = format!("The parts together have not the {promised} bytes that were announced.");
    Error::invalid("part_ids", message)
}

/// An upload that still takes parts.
fn pending(tx: &Tx<'_>, project: ProjectId, id: &str) -> Result<Document, Error> {
    let document = tx.get(project, Kind::Upload, "", id)?.ok_or_else(|| not_found(id))?;
    let late = document.body["expires_at"].as_u64().is_some_and(|at_s| at_s <= unix_now_s());
    match document.body["status"].as_str() {
        Some("pending") if !late => Ok(document),
        status => {
            let status = if late { "expired" } else { status.unwrap_or_default() };
            Err(Error::invalid("upload_id", format!("The upload '{id}' is {status}.")))
        }
    }
}

/// Without what is ours alone.
fn shown(mut body: Value) -> Value {
    if let Some(upload) = body.as_object_mut() {
        upload.remove("file_lifetime_s");
        upload.remove("mime_type");
    }
    body
}
