//! `/v1/files` and `/v1/uploads`: bodies in forms and JSON to the files room, contents back out.

use std::io::Read;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart};
use axum::extract::{DefaultBodyLimit, Extension, FromRequest, Path, Request, State};
use axum::handler::Handler;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::Response;
use futures_util::stream;
use serde_json::{Value, json};

use super::error::ApiError;
use super::extract::{Fields, kind};
use super::paging::{self, PageRule, Query};
use super::reference::{Routes, answers, delete, get, post};
use super::{App, aside, declared_len, fields, ids};
use crate::auth::Caller;
use crate::error::Error;
use crate::files::{
    FILE_BYTES_MAX, NewFile, NewUpload, PART_BYTES_MAX, PURPOSES, Page, UPLOAD_BYTES_MAX, Writing,
    too_large,
};
use crate::types::ProjectId;

/// Characters of a file's name.
const NAME_CHARS_MAX: usize = 512;
/// Bytes of a field of a form that is no file.
const WORD_BYTES_MAX: usize = 4096;
/// Seconds that a file may live, when it does not live for ever: an hour to thirty days.
pub(super) const LIFETIME_S: std::ops::RangeInclusive<i64> = 3600..=2_592_000;
/// Fields of a form.
const FIELDS_MAX: usize = 64;
/// Bytes of a form besides its file: what is longer has too long a file.
const FORM_BYTES_MAX: u64 = 1 << 20;
/// 10,000, newest first.
const PAGE: PageRule = PageRule { limit: 10_000, max: 10_000, descending: true };
/// Contents leave in pieces of this many bytes.
const PIECE: usize = 64 << 10;

const GROUP: &str = "Files";

type Answer = Result<Json<Value>, ApiError>;

pub(super) fn routes() -> Routes {
    // Contents go to the disk as they come, and have limits of their own.
    let unbounded = DefaultBodyLimit::disable;
    let list = get("/v1/files", "listFiles", GROUP, "Lists files.").paged(PAGE, &answers::FILE);
    let by = [("purpose", fields::Takes::Word(&PURPOSES), "Only files of this purpose.")];
    let begin = json!({"filename": "a.jsonl", "purpose": "batch", "bytes": 2,
        "mime_type": "application/jsonl"});
    Routes::new()
        .add(
            post("/v1/files", "createFile", GROUP, "Uploads a file.")
                .form("file", fields::FILE)
                .answers(&answers::FILE),
            create.layer(unbounded()),
        )
        .add(list.query(&by), self::list)
        .add(
            get("/v1/files/{file_id}", "retrieveFile", GROUP, "A file.").answers(&answers::FILE),
            one,
        )
        .add(
            delete("/v1/files/{file_id}", "deleteFile", GROUP, "Deletes a file.").deletes("file"),
            remove,
        )
        .add(
            get("/v1/files/{file_id}/content", "downloadFile", GROUP, "What is in a file.")
                .content("application/octet-stream"),
            content,
        )
        .add(
            post("/v1/uploads", "createUpload", GROUP, "Begins an upload in parts.")
                .json(fields::UPLOAD)
                .example(begin)
                .answers(&answers::UPLOAD),
            begin_upload,
        )
        .add(
            post("/v1/uploads/{upload_id}/parts", "addUploadPart", GROUP, "Adds a part.")
                .form("data", fields::UPLOAD_PART)
                .answers(&answers::PART),
            add_part.layer(unbounded()),
        )
        .add(
            post(
                "/v1/uploads/{upload_id}/complete",
                "completeUpload",
                GROUP,
                "Makes a file of the parts.",
            )
            .json(fields::UPLOAD_COMPLETE)
            .example(json!({"part_ids": []}))
            .answers(&answers::UPLOAD),
            complete_upload,
        )
        .add(
            post("/v1/uploads/{upload_id}/cancel", "cancelUpload", GROUP, "Gives an upload up.")
                .answers(&answers::UPLOAD),
            cancel_upload,
        )
}

/// `POST /v1/files`.
async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let form = form(&app, request, "file", FILE_BYTES_MAX, fields::FILE).await?;
    let Form { mut fields, filename, content } = form;
    let content = content.ok_or_else(|| ApiError::missing("file"))?;
    let filename = checked_name("file", filename.unwrap_or_default())?;
    let purpose = purpose(&mut fields)?;
    let lifetime_s = lifetime(&mut fields, "expires_after")?;
    let new = NewFile { filename, purpose, lifetime_s };
    let id = ids::random("file-");
    let files = Arc::clone(&app.rooms.files);
    let project = caller.project;
    Ok(Json(aside(move || files.keep(project, &id, &new, content)).await?))
}

/// `GET /v1/files`.
async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Answer {
    let mut query = Query::parse(&uri)?;
    let purpose = query.take("purpose");
    let files = Arc::clone(&app.rooms.files);
    let list = move |page: &Page| files.list(caller.project, purpose.as_deref(), page);
    paging::answer(&app, &caller, query, PAGE, list).await
}

/// `GET /v1/files/{file_id}`.
async fn one(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Answer {
    let files = Arc::clone(&app.rooms.files);
    Ok(Json(aside(move || files.get(caller.project, &id)).await?))
}

/// `DELETE /v1/files/{file_id}`.
async fn remove(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Answer {
    let files = Arc::clone(&app.rooms.files);
    let deleted = json!({"id": id, "object": "file", "deleted": true});
    aside(move || files.delete(caller.project, &id)).await?;
    Ok(Json(deleted))
}

/// `GET /v1/files/{file_id}/content`.
async fn content(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let files = Arc::clone(&app.rooms.files);
    let (object, file) = aside(move || files.content(caller.project, &id)).await?;
    let pieces = stream::try_unfold(file, |mut file| {
        aside(move || {
            let mut piece = vec![0; PIECE];
            let got = file.read(&mut piece);
            let got = got.map_err(|e| Error::Internal(format!("a file cannot be read: {e}")))?;
            piece.truncate(got);
            Ok((got > 0).then_some((piece, file)))
        })
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    let bytes = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, bytes);
    headers.insert(header::CONTENT_LENGTH, object["bytes"].as_u64().unwrap_or_default().into());
    // Never shown as a page of ours, whatever is in it.
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

/// `POST /v1/uploads`.
async fn begin_upload(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::UPLOAD, "", app.config.lenient_fields)?;
    let filename = body.string("filename")?.ok_or_else(|| ApiError::missing("filename"))?;
    let filename = checked_name("filename", filename)?;
    let purpose = purpose(&mut body)?;
    let bytes = body.integer("bytes", 1..=UPLOAD_BYTES_MAX as i64)?;
    let bytes = bytes.ok_or_else(|| ApiError::missing("bytes"))?.unsigned_abs();
    let mime_type = body.string("mime_type")?.ok_or_else(|| ApiError::missing("mime_type"))?;
    let mime_type = checked_name("mime_type", mime_type)?;
    let lifetime_s = lifetime(&mut body, "expires_after")?;
    let file = NewFile { filename, purpose, lifetime_s };
    let new = NewUpload { file, bytes, mime_type };
    let id = ids::random("upload_");
    let files = Arc::clone(&app.rooms.files);
    Ok(Json(aside(move || files.begin_upload(caller.project, &id, &new)).await?))
}

/// `POST /v1/uploads/{upload_id}/parts`.
async fn add_part(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(upload): Path<String>,
    request: Request,
) -> Answer {
    check_upload(&app, caller.project, &upload).await?;
    let form = form(&app, request, "data", PART_BYTES_MAX, fields::UPLOAD_PART).await?;
    let content = form.content.ok_or_else(|| ApiError::missing("data"))?;
    let id = ids::random("part_");
    let files = Arc::clone(&app.rooms.files);
    let project = caller.project;
    Ok(Json(aside(move || files.add_part(project, &upload, &id, content)).await?))
}

/// `POST /v1/uploads/{upload_id}/complete`.
async fn complete_upload(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(upload): Path<String>,
    request: Request,
) -> Answer {
    let mut body = app.body(request).await?;
    fields::check(body.map(), fields::UPLOAD_COMPLETE, "", app.config.lenient_fields)?;
    let parts = body.value("part_ids").ok_or_else(|| ApiError::missing("part_ids"))?;
    let Value::Array(parts) = parts else {
        return Err(ApiError::wrong_type("part_ids", "an array", kind(&parts)));
    };
    let word = |(i, part): (usize, &Value)| match part.as_str() {
        Some(part) => Ok(part.to_owned()),
        None => Err(ApiError::wrong_type(&format!("part_ids[{i}]"), "a string", kind(part))),
    };
    let parts = parts.iter().enumerate().map(word).collect::<Result<Vec<_>, _>>()?;
    let md5 = body.string("md5")?;
    let id = ids::random("file-");
    let files = Arc::clone(&app.rooms.files);
    let project = caller.project;
    let done = aside(move || files.complete_upload(project, &upload, &parts, md5.as_deref(), &id));
    Ok(Json(done.await?))
}

/// `POST /v1/uploads/{upload_id}/cancel`.
async fn cancel_upload(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(upload): Path<String>,
) -> Answer {
    let files = Arc::clone(&app.rooms.files);
    Ok(Json(aside(move || files.cancel_upload(caller.project, &upload)).await?))
}

async fn check_upload(app: &App, project: ProjectId, upload: &str) -> Result<(), Error> {
    let (files, upload) = (Arc::clone(&app.rooms.files), upload.to_owned());
    aside(move || files.check_upload(project, &upload)).await
}

/// A form with one file, which is on the disk already, and words beside it.
struct Form {
    fields: Fields,
    filename: Option<String>,
    content: Option<Writing>,
}

/// Reads a form whose field `file` is a file.
async fn form(
    app: &App,
    request: Request,
    file: &str,
    bytes_max: u64,
    table: &[fields::Field],
) -> Result<Form, ApiError> {
    let most = bytes_max + FORM_BYTES_MAX;
    if declared_len(request.headers()).is_some_and(|len| len > most) {
        return Err(too_large(bytes_max).into()); // unread, as in `App::body`
    }
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|error| ApiError::not_a_form(&error.body_text()))?;
    let (mut words, mut filename, mut content) = (serde_json::Map::new(), None, None);
    let mut count = 0;
    while let Some(field) = next(app, &mut form).await? {
        // Counted here and not in `words`, where many are members of one.
        count += 1;
        if count > FIELDS_MAX {
            return Err(ApiError::too_many_fields(FIELDS_MAX));
        }
        let name = field.name().unwrap_or_default().to_owned();
        if name == file {
            if content.is_some() {
                return Err(twice(file));
            }
            filename = field.file_name().map(str::to_owned);
            content = Some(save(app, field, bytes_max).await?);
        } else {
            put(&mut words, &name, word(app, &name, field).await?)?;
        }
    }
    fields::check(&words, table, "", app.config.lenient_fields)?;
    Ok(Form { fields: Fields::within("", words), filename, content })
}

/// `expires_after[seconds]` is a member of `expires_after`.
fn put(
    words: &mut serde_json::Map<String, Value>,
    name: &str,
    text: String,
) -> Result<(), ApiError> {
    let before = match name.split_once('[').map(|(object, key)| (object, key.strip_suffix(']'))) {
        Some((object, Some(key))) => {
            let object = words.entry(object).or_insert_with(|| json!({}));
            // A number in a form is text.
            let number = text.parse::<i64>().map_or(Value::String(text), Value::from);
            object
                .as_object_mut()
                .map(|object| object.insert(key.to_owned(), number))
                .unwrap_or(Some(Value::Null))
        }
        _ => words.insert(name.to_owned(), Value::String(text)),
    };
    before.map_or(Ok(()), |_| Err(twice(name)))
}

/// Which of the two was meant, nobody knows.
fn twice(name: &str) -> ApiError {
    ApiError::invalid(name, format!("Invalid '{name}': it is in the form more than once."))
}

/// The next field, within the time that a whole body of JSON has.
async fn next<'a>(app: &App, form: &'a mut Multipart) -> Result<Option<Field<'a>>, ApiError> {
    let limit = app.config.body_timeout;
    let field = tokio::time::timeout(limit, form.next_field()).await;
    field.map_err(|_| ApiError::body_too_slow(limit))?.map_err(broken)
}

/// What comes next, within the time that a whole body of JSON has.
async fn piece(app: &App, field: &mut Field<'_>) -> Result<Option<Bytes>, ApiError> {
    let limit = app.config.body_timeout;
    let piece = tokio::time::timeout(limit, field.chunk()).await;
    piece.map_err(|_| ApiError::body_too_slow(limit))?.map_err(broken)
}

async fn save(app: &App, mut field: Field<'_>, bytes_max: u64) -> Result<Writing, ApiError> {
    let files = Arc::clone(&app.rooms.files);
    let mut writing = aside(move || files.write(bytes_max)).await?;
    while let Some(piece) = piece(app, &mut field).await? {
        writing = aside(move || writing.push(&piece).map(|()| writing)).await?;
    }
    Ok(writing)
}

async fn word(app: &App, name: &str, mut field: Field<'_>) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = piece(app, &mut field).await? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > WORD_BYTES_MAX {
            let message = format!("Invalid '{name}': longer than {WORD_BYTES_MAX} bytes.");
            return Err(ApiError::invalid(name, message));
        }
    }
    let invalid = |_| ApiError::invalid(name, format!("Invalid '{name}': it is not UTF-8."));
    String::from_utf8(bytes).map_err(invalid)
}

fn broken(error: axum::extract::multipart::MultipartError) -> ApiError {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(FILE_BYTES_MAX as usize),
        _ => ApiError::unreadable_body(),
    }
}

fn checked_name(param: &str, name: String) -> Result<String, ApiError> {
    let len = name.chars().count();
    if len == 0 || len > NAME_CHARS_MAX || name.contains(char::is_control) {
        let message = format!(
            "Invalid '{param}': expected a name of 1 to {NAME_CHARS_MAX} printable characters."
        );
        return Err(ApiError::invalid(param, message));
    }
    Ok(name)
}

fn purpose(fields: &mut Fields) -> Result<String, ApiError> {
    let purpose = fields.string("purpose")?.ok_or_else(|| ApiError::missing("purpose"))?;
    if PURPOSES.contains(&purpose.as_str()) {
        return Ok(purpose);
    }
    let list = PURPOSES.map(|purpose| format!("'{purpose}'")).join(", ");
    let message = format!("Invalid value: '{purpose}'. Supported values are: {list}.");
    Err(ApiError::invalid("purpose", message))
}

/// `expires_after`, or what it is called: how many seconds after its creation a file goes.
pub(super) fn lifetime(fields: &mut Fields, name: &str) -> Result<Option<u64>, ApiError> {
    let Some(expires_after) = fields.object(name)? else { return Ok(None) };
    fields::check(&expires_after, fields::EXPIRES_AFTER, &format!("{name}."), false)?;
    let member = |member: &str| {
        let path = format!("{name}.{member}");
        let value = expires_after.get(member).ok_or_else(|| ApiError::missing(&path));
        value.map(|value| (path, value))
    };
    let (path, anchor) = member("anchor")?;
    if anchor != "created_at" {
        let message = format!("Invalid '{path}': the only value is 'created_at'.");
        return Err(ApiError::invalid(&path, message));
    }
    let (path, seconds) = member("seconds")?;
    Ok(Some(super::extract::integer(&path, seconds, LIFETIME_S)?.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn brackets_make_objects_and_numbers() {
        let mut words = serde_json::Map::new();
        for (name, text) in [
            ("purpose", "batch"),
            ("expires_after[anchor]", "created_at"),
            ("expires_after[seconds]", "3600"),
        ] {
            put(&mut words, name, text.to_owned()).unwrap();
        }
        let mut fields = Fields::within("", words);
        assert_eq!(purpose(&mut fields).unwrap(), "batch");
        assert_eq!(lifetime(&mut fields, "expires_after").unwrap(), Some(3600));
    }

    #[test]
    fn wrong_words_are_refused_by_name() {
        let refused = |result: Result<(), ApiError>| result.unwrap_err().param.unwrap();
        assert_eq!(refused(purpose(&mut fields(json!({}))).map(drop)), "purpose");
        assert_eq!(refused(purpose(&mut fields(json!({"purpose": "fun"}))).map(drop)), "purpose");
        for (value, param) in [
            (json!({"seconds": 3600}), "expires_after.anchor"),
            (json!({"anchor": "now", "seconds": 3600}), "expires_after.anchor"),
            (json!({"anchor": "created_at"}), "expires_after.seconds"),
            (json!({"anchor": "created_at", "seconds": 3599}), "expires_after.seconds"),
            (json!({"anchor": "created_at", "seconds": 2_592_001}), "expires_after.seconds"),
            (json!({"anchor": "created_at", "days": 3}), "expires_after.days"),
            (json!(3), "expires_after"),
        ] {
            let mut fields = fields(json!({"expires_after": value}));
            assert_eq!(refused(lifetime(&mut fields, "expires_after").map(drop)), param);
        }
        for name in ["", "a\nb", &"x".repeat(513)] {
            assert_eq!(refused(checked_name("file", name.into()).map(drop)), "file");
        }
    }
}
