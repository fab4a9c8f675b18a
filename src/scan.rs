//! Reads JSON of the usual shape, in place and without a look at what nobody needs.
//!
//! A general parser spends most of its time on what strings might hold. The one here knows strings without escapes,
//! and gives up where something else comes: the caller then asks serde_json, which also says what is wrong.

/// The bytes that are looked at together.
pub const WORD: usize = 8;

/// A place in a JSON text. Every step leads over white space, and is `None` where something else is there.
pub struct Reader<'a> {
    text: &'a str,
    place: usize,
}

impl<'a> Reader<'a> {
    /// At the start of `text`.
    pub fn new(text: &'a str) -> Self {
        Self { text, place: 0 }
    }

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
        self.take(b'"')?;
        let start = self.place;
        self.go_to_special()?;
        let text = self.text.get(start..self.place);
        self.take(b'"').and(text)
    }

    /// Any string, as it stands there with its quotes.
    pub fn raw_string(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let start = self.place - 1;
        while self.go_to_special()? == b'\\' {
            self.place += 2;
        }
        self.take(b'"')?;
        self.text.get(start..self.place)
    }

    /// Reads `null`.
    pub fn null(&mut self) -> Option<()> {
        self.peek();
        self.text.get(self.place..)?.starts_with("null").then(|| self.place += 4)
    }

    /// Goes over a value, which need not be JSON in every part.
    pub fn skip(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match self.peek()? {
                b'"' => drop(self.raw_string()?),
                b'{' | b'[' => {
                    self.place += 1;
                    depth += 1;
                    continue;
                }
                b'}' | b']' => {
                    self.place += 1;
                    depth = depth.checked_sub(1)?;
                }
                b',' | b':' if depth > 0 => {
                    self.place += 1;
                    continue;
                }
                b',' | b':' => return None,
                _ => {
                    let rest = self.text.as_bytes()[self.place..].iter();
                    self.place += rest.take_while(|byte| !b"]}, \t\r\n".contains(byte)).count();
                }
            }
            if depth == 0 {
                return Some(());
            }
        }
    }

    /// Whether nothing but white space is left.
    pub fn is_at_end(&mut self) -> bool {
        self.peek().is_none()
    }

    /// The next byte.
    #[inline]
    pub fn peek(&mut self) -> Option<u8> {
        loop {
            match self.text.as_bytes().get(self.place)? {
                b' ' | b'\t' | b'\r' | b'\n' => self.place += 1,
                byte => return Some(*byte),
            }
        }
    }

    #[inline]
    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.place += 1)
    }

    /// Goes to the quote or backslash that comes first.
    #[inline]
    fn go_to_special(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while let Some(word) = bytes.get(self.place..)?.first_chunk() {
            let plain = plain_bytes(*word);
            self.place += plain;
            if plain < WORD {
                break;
            }
        }
        while is_plain(*bytes.get(self.place)?) {
            self.place += 1;
        }
        Some(bytes[self.place]).filter(|byte| matches!(byte, b'"' | b'\\'))
    }
}

/// Whether a byte stands for itself in a string.
fn is_plain(byte: u8) -> bool {
    byte >= b' ' && byte != b'"' && byte != b'\\'
}

/// How many of eight bytes come before the first that does not stand for itself in a string: a quote, a backslash, or a
/// control character.
///
/// All eight at once: <https://graphics.stanford.edu/~seander/bithacks.html#ZeroInWord>.
#[inline]
pub fn plain_bytes(word: [u8; WORD]) -> usize {
    const ONES: u64 = u64::from_le_bytes([1; WORD]);
    const HIGH_BITS: u64 = u64::from_le_bytes([0x80; WORD]);
    let each = |byte: u8| ONES * u64::from(byte);
    // In each, the lowest bit that is set tells the first byte; those above may be wrong.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGH_BITS;

    let word = u64::from_le_bytes(word);
    let controls = word.wrapping_sub(each(b' ')) & !word & HIGH_BITS;
    let special = zeros(word ^ each(b'"')) | zeros(word ^ each(b'\\')) | controls;
    special.trailing_zeros() as usize / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_does_not_stand_for_itself_is_found_at_every_place() {
        for place in 0..WORD {
            for byte in 0..=u8::MAX {
                for filler in [b' ', b'a', b'!', b'#', b'[', b']', 0x7f, 0x80, 0xff] {
                    let mut word = [filler; WORD];
                    word[place] = byte;
                    let expected = word.iter().take_while(|byte| is_plain(**byte)).count();
                    assert_eq!(plain_bytes(word), expected, "{word:?}");
                }
            }
        }
    }
}
