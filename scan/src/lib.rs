//! A zero-copy JSON reader for the common case. It gives up on anything uncommon: the caller then falls back to serde_json, which
//! also reports errors.
//!
//! From what it accepts, serde_json reads the same values. [`Reader::skip`] and [`Reader::raw_string`] do not validate.

use wide::u8x16;

/// The number of bytes that are compared at once.
const TOGETHER: usize = 16;
/// The deepest nesting that [`Reader::skip_plain`] skips.
const DEPTH_MAX: u32 = 32;

/// A position in a JSON text. Every method skips white space first, and returns `None` if the text has something else there.
///
/// With `QUOTED`, the text is the content of a JSON string: JSON in JSON, whose quotes are escaped by a backslash. So it is read
/// without a copy.
#[derive(Clone, Debug)]
pub struct Reader<'a, const QUOTED: bool = false> {
    text: &'a str,
    position: usize,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `text`.
    pub fn new(text: &'a str) -> Self {
        Self { text, position: 0 }
    }

    /// Reads any string. Returns it raw, with its quotes.
    pub fn raw_string(&mut self) -> Option<&'a str> {
        self.peek()?;
        let start = self.position;
        self.take_quote()?;
        self.position += end_of_string(&self.text.as_bytes()[self.position..]);
        self.take_quote()?;
        self.text.get(start..self.position)
    }

    /// Skips a value, without validating it.
    pub fn skip(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match self.peek()? {
                b'"' => drop(self.raw_string()?),
                b'{' | b'[' => {
                    self.position += 1;
                    depth += 1;
                    continue;
                }
                b'}' | b']' => {
                    self.position += 1;
                    depth = depth.checked_sub(1)?;
                }
                b',' | b':' if depth > 0 => {
                    self.position += 1;
                    continue;
                }
                b',' | b':' => return None,
                _ => {
                    let rest = self.text.as_bytes()[self.position..].iter();
                    self.position += rest.take_while(|byte| !b"]}, \t\r\n".contains(byte)).count();
                }
            }
            if depth == 0 {
                return Some(());
            }
        }
    }
}

impl<'a> Reader<'a, true> {
    /// A reader at the start of the content of `json`, a JSON string.
    pub fn in_string(json: &'a str) -> Option<Self> {
        let text = json.strip_prefix('"')?.strip_suffix('"')?;
        Some(Self { text, position: 0 })
    }

    /// Skips a value whose strings have no escapes.
    pub fn skip_plain(&mut self) -> Option<()> {
        self.skip_down_to(DEPTH_MAX)
    }

    fn skip_down_to(&mut self, depth: u32) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match self.peek()? {
            b'\\' => self.string().map(drop),
            b'{' => self.object(|reader, _| reader.skip_down_to(depth)),
            b'[' => self.array(|reader| reader.skip_down_to(depth)),
            _ => self.literal().map(drop),
        }
    }
}

impl<'a, const QUOTED: bool> Reader<'a, QUOTED> {
    /// Reads an object; `field` gets the name of each field, and must read the value.
    pub fn object(&mut self, mut field: impl FnMut(&mut Self, &'a str) -> Option<()>) -> Option<()> {
        self.list(b'{', b'}', |reader| {
            let name = reader.string()?;
            reader.take(b':')?;
            field(reader, name)
        })
    }

    /// Reads an array; `element` must read one element.
    pub fn array(&mut self, element: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.list(b'[', b']', element)
    }

    fn list(&mut self, open: u8, close: u8, mut element: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.take(open)?;
        if self.take(close).is_some() {
            return Some(());
        }
        loop {
            element(self)?;
            if self.take(b',').is_none() {
                return self.take(close);
            }
        }
    }

    /// Reads a string without escapes. Returns its content.
    #[inline]
    pub fn string(&mut self) -> Option<&'a str> {
        self.peek()?;
        self.take_quote()?;
        let start = self.position;
        self.go_to_special();
        let text = self.text.get(start..self.position);
        self.take_quote().and(text)
    }

    /// Reads a number, `true`, `false` or `null`. Returns it raw.
    pub fn literal(&mut self) -> Option<&'a str> {
        self.peek()?;
        let rest = self.text.get(self.position..)?;
        let end = rest.bytes().position(|byte| b",]} \t\r\n".contains(&byte)).unwrap_or(rest.len());
        let literal = rest.get(..end)?;
        (matches!(literal, "true" | "false" | "null") || is_number(literal)).then(|| self.position += end)?;
        Some(literal)
    }

    /// Whether nothing but white space is left.
    pub fn is_at_end(&mut self) -> bool {
        self.peek().is_none()
    }

    /// The next byte that is not white space.
    #[inline]
    pub fn peek(&mut self) -> Option<u8> {
        loop {
            match self.text.as_bytes().get(self.position)? {
                b' ' | b'\t' | b'\r' | b'\n' => self.position += 1,
                byte => return Some(*byte),
            }
        }
    }

    #[inline]
    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.position += 1)
    }

    /// Reads a quote, without skipping white space.
    #[inline]
    fn take_quote(&mut self) -> Option<()> {
        let quote: &[u8] = if QUOTED { b"\\\"" } else { b"\"" };
        self.text.as_bytes().get(self.position..)?.starts_with(quote).then(|| self.position += quote.len())
    }

    /// Goes to the first quote, backslash or control character, or to the end.
    #[inline]
    fn go_to_special(&mut self) {
        let rest = self.text.as_bytes().get(self.position..).unwrap_or_default();
        let (chunks, end) = rest.as_chunks();
        // The byte's place in its chunk is computed once, after the loop, so that the loop need not wait for it.
        let found = chunks.iter().map(|chunk| Special::of(*chunk).any()).enumerate().find(|(_, special)| *special != 0);
        self.position += match found {
            Some((index, special)) => index * TOGETHER + special.trailing_zeros() as usize,
            None => rest.len() - end.len() + end.iter().take_while(|byte| is_plain(**byte)).count(),
        };
    }
}

/// The number of bytes before the quote that ends a string, or before a control character, which no string may have.
fn end_of_string(text: &[u8]) -> usize {
    let mut position = 0;
    // JSON in JSON has an escaped quote every few bytes, so chunks with such escapes are read whole. An escaped backslash is
    // rare: from its chunk on, the rest is read byte by byte.
    let mut is_escaped = 0;
    for chunk in text.as_chunks().0 {
        let Special { quotes, backslashes, controls } = Special::of(*chunk);
        let escaped = backslashes << 1 | is_escaped;
        if backslashes & escaped != 0 {
            break;
        }
        let found = quotes & !escaped | controls;
        if found != 0 {
            return position + found.trailing_zeros() as usize;
        }
        is_escaped = escaped >> TOGETHER;
        position += TOGETHER;
    }
    let mut is_escaped = is_escaped != 0;
    let ends = |byte: &u8| {
        let ends = *byte < b' ' || *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        ends
    };
    position + text[position..].iter().position(ends).unwrap_or(text.len() - position)
}

/// Whether a text is a number by JSON's grammar.
fn is_number(text: &str) -> bool {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let text = text.strip_prefix('-').unwrap_or(text);
    let whole = digits(text);
    if whole == 0 || whole > 1 && text.starts_with('0') {
        return false;
    }
    let mut rest = &text[whole..];
    if let Some(fraction) = rest.strip_prefix('.') {
        let len = digits(fraction);
        if len == 0 {
            return false;
        }
        rest = &fraction[len..];
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        let len = digits(exponent);
        return len > 0 && len == exponent.len();
    }
    rest.is_empty()
}

/// Whether a byte is neither a quote, a backslash nor a control character.
fn is_plain(byte: u8) -> bool {
    byte >= b' ' && byte != b'"' && byte != b'\\'
}

/// The bytes of a chunk that are not plain: a bit each, the lowest for the first byte.
struct Special {
    quotes: u32,
    backslashes: u32,
    controls: u32,
}

impl Special {
    #[inline]
    fn of(bytes: [u8; TOGETHER]) -> Self {
        let bytes = u8x16::new(bytes);
        let equal = |byte| bytes.simd_eq(u8x16::splat(byte)).to_bitmask();
        let controls = bytes.min(u8x16::splat(b' ' - 1)).simd_eq(bytes).to_bitmask();
        Self { quotes: equal(b'"'), backslashes: equal(b'\\'), controls }
    }

    #[inline]
    fn any(&self) -> u32 {
        self.quotes | self.backslashes | self.controls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_plain_values_are_json() {
        let value = r#"{"a": [1, -2.50e+7, true, null, {"b": "c"}], "d": "é", "e": {}, "f": []}"#;
        let json = |text: &str| serde_json::to_string(text).unwrap();
        let skips = |json: &str| {
            let mut reader = Reader::in_string(json).unwrap();
            reader.skip_plain().is_some() && reader.is_at_end()
        };
        assert!(skips(&json(value)));
        // Each byte removed, or replaced by another.
        for (position, _) in value.char_indices() {
            for put in ["", "\"", "\\", "{", "}", "[", "]", ",", ":", " ", "\n", "\0", "n", "0", "-", ".", "e"] {
                let rest = value[position..].chars().next().map_or(0, char::len_utf8);
                let text = format!("{}{put}{}", &value[..position], &value[position + rest..]);
                if skips(&json(&text)) {
                    assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{text}");
                }
            }
        }
        assert!(skips(&json(&format!("{}{}", "[".repeat(31), "]".repeat(31)))));
        assert!(!skips(&json(&format!("{}{}", "[".repeat(33), "]".repeat(33)))));
    }

    #[test]
    fn a_special_byte_is_found_at_every_position() {
        for position in 0..TOGETHER {
            for byte in 0..=u8::MAX {
                for filler in [b' ', b'a', b'!', b'#', b'[', b']', 0x7f, 0x80, 0xff] {
                    let mut bytes = [filler; TOGETHER];
                    bytes[position] = byte;
                    let expected = bytes.iter().rev().fold(0, |bits, byte| bits << 1 | u32::from(!is_plain(*byte)));
                    assert_eq!(Special::of(bytes).any(), expected, "{bytes:?}");
                }
            }
        }
    }

    #[test]
    fn a_string_ends_at_the_first_quote_that_is_not_escaped() {
        let parts = ["", "\"", "\\\"", "\\\\", "\\\\\"", "\\\\\\\"", "\\", "\\n", "\n", "a\\\"a"];
        // At all positions of a chunk, and across its end.
        for (before, between) in (0..=TOGETHER).flat_map(|before| (0..=TOGETHER).map(move |between| (before, between)))
        {
            for (first, second) in parts.iter().flat_map(|first| parts.map(|second| (first, second))) {
                for after in [0, 1, TOGETHER] {
                    let plain = |len| "a".repeat(len);
                    let text = format!("{}{first}{}{second}{}", plain(before), plain(between), plain(after));
                    let mut escaped = false;
                    let ends = |byte| {
                        let ends = byte < b' ' || byte == b'"' && !escaped;
                        escaped = byte == b'\\' && !escaped;
                        ends
                    };
                    let end = text.bytes().position(ends).unwrap_or(text.len());
                    assert_eq!(end_of_string(text.as_bytes()), end, "{text:?}");
                }
            }
        }
    }
}
