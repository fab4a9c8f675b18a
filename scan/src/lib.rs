//! A zero-copy JSON reader for the common case. It gives up where anything uncommon comes: the caller then asks serde_json, which
//! also says what is wrong.
//!
//! serde_json reads the same values from what it accepts. Two methods do not validate: [`Reader::skip`] and [`Reader::raw_string`].

use wide::u8x16;

/// The bytes that are looked at together.
const TOGETHER: usize = 16;
/// How deep a value may be nested that is skipped.
const DEPTH_MAX: u32 = 32;

/// A position in a JSON text. Every step leads over white space, and is `None` if something else is there.
///
/// With `QUOTED` the text is the content of a string: JSON in JSON, whose own quotes have a backslash before them. So a text
/// need not be copied to be read.
#[derive(Clone, Debug)]
pub struct Reader<'a, const QUOTED: bool = false> {
    text: &'a str,
    position: usize,
}

impl<'a> Reader<'a> {
    /// At the start of `text`.
    pub fn new(text: &'a str) -> Self {
        Self { text, position: 0 }
    }

    /// Any string, as it stands there with its quotes.
    pub fn raw_string(&mut self) -> Option<&'a str> {
        self.peek()?;
        let start = self.position;
        self.take_quote()?;
        self.position += end_of_string(&self.text.as_bytes()[self.position..]);
        self.take_quote()?;
        self.text.get(start..self.position)
    }

    /// Goes over a value, which need not be JSON in every part.
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
    /// At the start of what `json`, a string, stands for.
    pub fn in_string(json: &'a str) -> Option<Self> {
        let text = json.strip_prefix('"')?.strip_suffix('"')?;
        Some(Self { text, position: 0 })
    }

    /// Goes over a value whose strings have no escapes.
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
    /// Reads an object; `field` gets the name of each of its fields, and reads the value.
    pub fn object(&mut self, mut field: impl FnMut(&mut Self, &'a str) -> Option<()>) -> Option<()> {
        self.list(b'{', b'}', |reader| {
            let name = reader.string()?;
            reader.take(b':')?;
            field(reader, name)
        })
    }

    /// Reads an array; `element` reads each of its elements.
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

    /// The content of a string without escapes.
    #[inline]
    pub fn string(&mut self) -> Option<&'a str> {
        self.peek()?;
        self.take_quote()?;
        let start = self.position;
        self.go_to_special();
        let text = self.text.get(start..self.position);
        self.take_quote().and(text)
    }

    /// Reads a number, `true`, `false` or `null`, as it stands there.
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

    /// The next byte.
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

    /// Reads a quote, if it is the very next.
    #[inline]
    fn take_quote(&mut self) -> Option<()> {
        let quote: &[u8] = if QUOTED { b"\\\"" } else { b"\"" };
        self.text.as_bytes().get(self.position..)?.starts_with(quote).then(|| self.position += quote.len())
    }

    /// Goes to the first byte that does not stand for itself in a string, or to the end.
    #[inline]
    fn go_to_special(&mut self) {
        let rest = self.text.as_bytes().get(self.position..).unwrap_or_default();
        let (chunks, end) = rest.as_chunks();
        // Where in its chunk the byte is, is asked once only, at the end: the processor need not wait for it before it reads on.
        let found = chunks.iter().map(|chunk| Special::of(*chunk).any()).enumerate().find(|(_, special)| *special != 0);
        self.position += match found {
            Some((index, special)) => index * TOGETHER + special.trailing_zeros() as usize,
            None => rest.len() - end.len() + end.iter().take_while(|byte| is_plain(**byte)).count(),
        };
    }
}

/// How many bytes come before the quote that ends a string, or before something that no string has.
fn end_of_string(text: &[u8]) -> usize {
    let mut position = 0;
    // JSON in JSON has an escape every few bytes, a quote behind a backslash. Chunks with those alone are looked at whole; from a
    // backslash on that is itself escaped, which is rare, the rest goes byte by byte.
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

/// Whether a byte stands for itself in a string.
fn is_plain(byte: u8) -> bool {
    byte >= b' ' && byte != b'"' && byte != b'\\'
}

/// Which bytes do not stand for themselves in a string: a bit each, from the lowest on.
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
    fn whatever_is_skipped_is_json() {
        let value = r#"{"a": [1, -2.50e+7, true, null, {"b": "c"}], "d": "é", "e": {}, "f": []}"#;
        let json = |text: &str| serde_json::to_string(text).unwrap();
        let skips = |json: &str| {
            let mut reader = Reader::in_string(json).unwrap();
            reader.skip_plain().is_some() && reader.is_at_end()
        };
        assert!(skips(&json(value)));
        // Each byte gone, or another one in its place.
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
    fn a_byte_that_does_not_stand_for_itself_is_found_at_every_place() {
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
        // At all places of a chunk, and over its end.
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
