//! A table of fields as a schema.

use utoipa::openapi::extensions::Extensions;
use utoipa::openapi::schema::{
    AdditionalProperties, AnyOfBuilder, ArrayBuilder, KnownFormat, ObjectBuilder, SchemaFormat,
    SchemaType, Type,
};
use utoipa::openapi::{RefOr, Schema};

use crate::server::fields::{Field, Takes, Treatment};

/// Whether an object may have members that nobody named: an answer may, a body may not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extra {
    Allowed,
    Refused,
}

pub(super) fn object(table: &[Field], extra: Extra) -> ObjectBuilder {
    let mut object = ObjectBuilder::new().schema_type(Type::Object);
    for field in table {
        object = object.property(field.name, member(field, extra));
        if field.required {
            object = object.required(field.name);
        }
    }
    let closed = (extra == Extra::Refused).then_some(AdditionalProperties::FreeForm(false));
    object.additional_properties(closed)
}

/// A field: its type, and what becomes of it where that is not what one expects.
fn member(field: &Field, extra: Extra) -> RefOr<Schema> {
    let (treatment, reason) = match field.treatment {
        Treatment::Honoured => return of(field.takes, extra),
        Treatment::NoEffect(reason) => ("accepted without effect", reason),
        Treatment::Refused { reason, .. } => ("refused", reason),
    };
    simple(field.takes, extra)
        .description(Some(reason))
        .extensions(Some(Extensions::from_iter([("x-hearth-treatment", treatment)])))
        .into()
}

/// Whatever fits.
pub(super) fn of(takes: Takes, extra: Extra) -> RefOr<Schema> {
    let is_deep = |takes: &Takes| matches!(takes, Takes::Each(_) | Takes::Table(_));
    match takes {
        Takes::Each(item) => ArrayBuilder::new().items(of(*item, extra)).into(),
        Takes::OneOf(list) if list.iter().any(is_deep) => {
            list.iter().fold(AnyOfBuilder::new(), |any, takes| any.item(of(*takes, extra))).into()
        }
        // Of whatever: what makes clients wants to read something about the items.
        _ if takes.types().contains(&"array") => {
            let items = ObjectBuilder::new().schema_type(SchemaType::AnyValue);
            ArrayBuilder::new().schema_type(types(takes)).items(items).into()
        }
        _ => simple(takes, extra).into(),
    }
}

fn types(takes: Takes) -> SchemaType {
    let types: Vec<Type> = takes.types().into_iter().map(type_of).collect();
    match types[..] {
        [] => SchemaType::AnyValue,
        [ref one] => SchemaType::Type(one.clone()),
        _ => SchemaType::Array(types),
    }
}

fn simple(takes: Takes, extra: Extra) -> ObjectBuilder {
    let schema = ObjectBuilder::new().schema_type(types(takes));
    match takes {
        Takes::Table(table) => object(table, extra),
        Takes::Word(words) => schema.enum_values(Some(words.iter().copied())),
        Takes::Count(low, high) => schema.minimum(Some(low as isize)).maximum(Some(high as isize)),
        Takes::Between(low, high) => schema.minimum(Some(low)).maximum(Some(high)),
        _ => schema,
    }
}

fn type_of(name: &str) -> Type {
    match name {
        "boolean" => Type::Boolean,
        "integer" => Type::Integer,
        "number" => Type::Number,
        "array" => Type::Array,
        "object" => Type::Object,
        "null" => Type::Null,
        _ => Type::String,
    }
}

/// The bytes of a file.
pub(super) fn binary() -> RefOr<Schema> {
    let format = SchemaFormat::KnownFormat(KnownFormat::Binary);
    ObjectBuilder::new().schema_type(Type::String).format(Some(format)).into()
}
