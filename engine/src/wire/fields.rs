//! Little-endian fields, written and read one after another.

use super::WireError;

/// Appends fields to a buffer.
pub(crate) struct Writer<'a>(pub(crate) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u128(&mut self, value: u128) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.u32(value.len() as u32);
        self.0.extend_from_slice(value);
    }

    /// A text, cut at a character boundary if it is longer than `limit`.
    pub(crate) fn text(&mut self, value: &str, limit: usize) {
        let mut end = value.len().min(limit);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&value.as_bytes()[..end]);
    }

    /// An unsigned LEB128 number.
    pub(crate) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.u8(value as u8);
    }
}

/// Takes fields off a slice.
pub(crate) struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub(crate) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        let (taken, left) = self.left.split_at_checked(len).ok_or(WireError::Truncated(what))?;
        self.left = left;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let (taken, left) = self.left.split_first_chunk().ok_or(WireError::Truncated(what))?;
        self.left = left;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self, what: &'static str) -> Result<u128, WireError> {
        self.array(what).map(u128::from_le_bytes)
    }

    pub(crate) fn flag(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(WireError::Value { what, value: value.into() }),
        }
    }

    pub(crate) fn bytes(&mut self, what: &'static str, limit: usize) -> Result<&'a [u8], WireError> {
        let len = self.u32(what)?;
        if len as usize > limit {
            let (len, limit) = (len.into(), limit as u64);
            return Err(WireError::TooLong { what, len, limit });
        }
        self.take(len as usize, what)
    }

    /// A text; what is no UTF-8 in it, or would control a terminal, is replaced.
    pub(crate) fn text(&mut self, what: &'static str, limit: usize) -> Result<String, WireError> {
        let text = String::from_utf8_lossy(self.bytes(what, limit)?);
        Ok(text.chars().map(|c| if disturbs_terminals(c) { ' ' } else { c }).collect())
    }

    pub(crate) fn varint(&mut self, what: &'static str) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(what)?;
            let bits = u64::from(byte & 0x7F);
            if shift == 63 && bits > 1 {
                return Err(WireError::Value { what, value: byte.into() });
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(WireError::Value { what, value })
    }

    pub(crate) fn end(self) -> Result<(), WireError> {
        if self.left.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.left.len())) }
    }
}

/// Control characters, line separators and marks that turn the direction of writing.
fn disturbs_terminals(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{200E}' | '\u{200F}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip_and_overlong_ones_are_refused() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut bytes = Vec::new();
            Writer(&mut bytes).varint(value);
            let mut reader = Reader::new(&bytes);
            assert_eq!(reader.varint("v"), Ok(value));
            assert!(reader.is_empty());
        }
        assert!(Reader::new(&[0xFF; 11]).varint("v").is_err());
        assert!(Reader::new(&[0x80, 0x80]).varint("v").is_err());
    }

    #[test]
    fn long_texts_are_cut_at_a_character_and_control_characters_removed() {
        let mut bytes = Vec::new();
        Writer(&mut bytes).text("aä\u{1b}[2J", 2);
        assert_eq!(Reader::new(&bytes).text("t", 2).unwrap(), "a");
        bytes.clear();
        Writer(&mut bytes).text("x\u{1b}y", 100);
        assert_eq!(Reader::new(&bytes).text("t", 100).unwrap(), "x y");
        assert!(Reader::new(&bytes).text("t", 2).is_err());
    }
}
