//! Reads a body's JSON once for the fields that the mapping names, and skips all others.
//!
//! Zero-copy scanner for the common case. Every other body goes to serde_json, which also finds what is wrong with it.

use std::{borrow::Cow, fmt};

use login_etl_scan::Reader;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{Invalid, shape};

/// The value of a field in one body. Not `Debug`, as it may be personal.
pub(super) enum Value<'a> {
    /// Not there.
    Absent,
    /// `null`.
    Null,
    /// The decoded string of a field that is only wanted as a string.
    Text(Cow<'a, str>),
    /// Another value of a field that is only wanted as a string.
    NotText,
    /// The raw JSON of any value but `null`.
    Json(&'a str),
    /// The field or a parent on its path is given more than once.
    Twice,
    /// A parent on its path is not an object.
    NoParent,
}

/// The wanted fields, as a tree of the names on their paths.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields {
    names: Vec<Name>,
    count: usize,
}

/// A key of an object: a field, a parent of fields, or both.
#[derive(Clone, Debug)]
struct Name {
    name: String,
    field: Option<Wanted>,
    inner: Vec<Name>,
}

#[derive(Clone, Copy, Debug)]
struct Wanted {
    slot: usize,
    as_json: bool,
}

impl Fields {
    /// Adds the field with this path, and returns the index of its value. With `as_json`, the value is wanted as raw JSON instead
    /// of a decoded string.
    pub(super) fn add(&mut self, path: &str, as_json: bool) -> usize {
        let mut names = &mut self.names;
        let mut parts = path.split('.').peekable();
        while let Some(part) = parts.next() {
            let index = names.iter().position(|name| name.name == part).unwrap_or_else(|| {
                names.push(Name { name: part.to_owned(), field: None, inner: Vec::new() });
                names.len() - 1
            });
            let name = &mut names[index];
            if parts.peek().is_none() {
                let next = self.count;
                let wanted = name.field.get_or_insert_with(|| {
                    self.count += 1;
                    Wanted { slot: next, as_json }
                });
                wanted.as_json |= as_json;
                return wanted.slot;
            }
            names = &mut name.inner;
        }
        unreachable!("a path has a last part")
    }

    /// The values of an undecoded body: `json` is a JSON string literal with its quotes, as in the event. `None` if the body is
    /// not of the common shape, a field is given twice, or a value has the wrong type.
    pub(super) fn scanned<'a>(&self, json: &'a str) -> Option<Vec<Value<'a>>> {
        let mut values = self.absent();
        let mut reader = Reader::in_string(json)?;
        scan(&self.names, &mut reader, &mut values)?;
        reader.is_at_end().then_some(values)
    }

    fn absent<'a>(&self) -> Vec<Value<'a>> {
        std::iter::repeat_with(|| Value::Absent).take(self.count).collect()
    }

    /// The values of a body, each at its field's index.
    ///
    /// # Errors
    /// [`Invalid`], if the body is not a JSON object.
    pub(super) fn values<'a>(&self, json: &'a str) -> Result<Vec<Value<'a>>, Invalid> {
        let mut values = self.absent();
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let read = Object { names: &self.names, values: &mut values }.deserialize(&mut deserializer);
        // The error's text may quote the body, so only its kind is used.
        match read.and_then(|()| deserializer.end()) {
            Ok(()) => Ok(values),
            Err(error) if error.is_data() && !json.trim_start().starts_with('{') => {
                Err(Invalid::NotAnObject(shape::of_value(json)))
            }
            Err(_) => Err(Invalid::NotJson(shape::of_text(json))),
        }
    }
}

/// Scans an object of the common shape. Must give the same values as [`Object`].
fn scan<'a>(names: &[Name], reader: &mut Reader<'a, true>, values: &mut [Value<'a>]) -> Option<()> {
    let mut expected = 0;
    reader.object(|reader, key| {
        let Some(index) = find(names, key, expected) else { return reader.skip_plain() };
        expected = index + 1;
        let name = &names[index];
        if name.is_given(values) {
            return None;
        }
        match (name.field, &*name.inner, reader.peek()?) {
            (Some(Wanted { slot, as_json: false }), [], b'\\') => {
                values[slot] = Value::Text(Cow::Borrowed(reader.string()?));
            }
            (Some(Wanted { slot, as_json }), [], _) => match reader.literal()? {
                "null" => values[slot] = Value::Null,
                literal if as_json => values[slot] = Value::Json(literal),
                _ => return None,
            },
            (None, inner, b'{') => {
                scan(inner, reader, values)?;
                mark_absent_as_null(inner, values);
            }
            _ => return None,
        }
        Some(())
    })
}

/// The index of a key among the names. Tries `expected` first, as messages of one sender have their fields in one order.
#[inline]
fn find(names: &[Name], key: &str, expected: usize) -> Option<usize> {
    let is_key = |index: &usize| names.get(*index).is_some_and(|name| name.name == key);
    Some(expected).filter(is_key).or_else(|| (0..names.len()).find(is_key))
}

/// Reads an object with serde_json.
struct Object<'n, 'v, 'a> {
    names: &'n [Name],
    values: &'v mut [Value<'a>],
}

impl<'de> DeserializeSeed<'de> for Object<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { names, values } = self;
        let mut expected = 0;
        while let Some(found) = map.next_key_seed(Key { names, expected })? {
            let Some(index) = found else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            expected = index + 1;
            let name = &names[index];
            if name.is_given(values) {
                map.next_value::<IgnoredAny>()?;
                name.mark_twice(values);
                continue;
            }
            match (name.field, &*name.inner) {
                (Some(Wanted { slot, as_json: false }), []) => values[slot] = map.next_value::<TextValue<'de>>()?.0,
                (None, inner) => {
                    let json: &'de RawValue = map.next_value()?;
                    read_inner(inner, json.get(), values).map_err(A::Error::custom)?;
                }
                (Some(Wanted { slot, .. }), inner) => {
                    let json: &'de RawValue = map.next_value()?;
                    let json = json.get();
                    read_inner(inner, json, values).map_err(A::Error::custom)?;
                    values[slot] = if json == "null" { Value::Null } else { Value::Json(json) };
                }
            }
        }
        Ok(())
    }
}

/// Reads the fields below a name.
fn read_inner<'a>(names: &[Name], json: &'a str, values: &mut [Value<'a>]) -> Result<(), serde_json::Error> {
    if names.is_empty() {
        return Ok(());
    }
    match json.as_bytes() {
        [b'{', ..] => {
            Object { names, values: &mut *values }.deserialize(&mut serde_json::Deserializer::from_str(json))?;
            mark_absent_as_null(names, values);
        }
        b"null" => names.iter().for_each(|name| name.replace(values, |_| true, || Value::Null)),
        _ => names.iter().for_each(|name| name.replace(values, |_| true, || Value::NoParent)),
    }
    Ok(())
}

/// Marks the fields that an object lacks as null after it was read, so that a second object of the same name is noticed.
fn mark_absent_as_null(names: &[Name], values: &mut [Value<'_>]) {
    names.iter().for_each(|name| name.replace(values, |value| matches!(value, Value::Absent), || Value::Null));
}

impl Name {
    /// Whether a value of it was read. No field below an object that was read is `Absent`.
    fn is_given(&self, values: &[Value<'_>]) -> bool {
        match self.field {
            Some(Wanted { slot, .. }) => !matches!(values[slot], Value::Absent),
            None => self.inner.iter().any(|name| name.is_given(values)),
        }
    }

    #[cold]
    fn mark_twice(&self, values: &mut [Value<'_>]) {
        self.replace(values, |_| true, || Value::Twice);
    }

    /// Replaces the values of this name and of all names below it.
    fn replace<'a>(
        &self,
        values: &mut [Value<'a>],
        which: impl Fn(&Value<'a>) -> bool + Copy,
        by: impl Fn() -> Value<'a> + Copy,
    ) {
        if let Some(Wanted { slot, .. }) = self.field
            && which(&values[slot])
        {
            values[slot] = by();
        }
        self.inner.iter().for_each(|name| name.replace(values, which, by));
    }
}

/// Reads an object's key as its index among the names.
struct Key<'n> {
    names: &'n [Name],
    expected: usize,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<usize>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Option<usize>, E> {
        Ok(find(self.names, key, self.expected))
    }
}

/// The value of a field that is only wanted as a string; borrowed if it has no escapes.
struct TextValue<'a>(Value<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for TextValue<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor).map(Self)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Value::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Value::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Value::NotText)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Value::NotText)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Value::NotText)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Value::NotText)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        IgnoredAny.visit_seq(seq).map(|_| Value::NotText)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        IgnoredAny.visit_map(map).map(|_| Value::NotText)
    }
}
