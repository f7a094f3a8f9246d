//! How this crate's structures become bytes: a magic number, a version, then postcard.
//!
//! KVM's own structures travel as they lie in memory: they are the kernel's ABI and do not change.
//! The bytes come from another host, so nothing is believed: a structure must have exactly its
//! length, and nothing is allocated by a number that the bytes only claim.

use std::marker::PhantomData;

use serde::de::value::BorrowedBytesDeserializer;
use serde::de::{DeserializeOwned, Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What kind of bytes these are, and which version of them this crate writes and reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub(crate) what: &'static str,
    pub(crate) magic: [u8; 8],
    pub(crate) version: u16,
}

const HEADER_LEN: usize = 10;

impl Format {
    /// Turns a value into bytes.
    pub(crate) fn pack<T: Serialize>(&self, value: &T) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        // Postcard fails only on full buffers and on lists that do not know their length: a vector
        // grows, and every list here is one.
        postcard::to_extend(value, bytes).expect("values of this crate can always be written")
    }

    /// Turns bytes back into a value, believing none of them.
    pub(crate) fn unpack<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, String> {
        let what = self.what;
        let (header, body) = bytes
            .split_at_checked(HEADER_LEN)
            .ok_or_else(|| format!("{} bytes are too few for {what}", bytes.len()))?;
        if header[..8] != self.magic {
            return Err(format!("these bytes are not {what}"));
        }
        let version = u16::from_le_bytes([header[8], header[9]]);
        if version != self.version {
            return Err(format!("{what} is of version {version}, and this side reads {} only", self.version));
        }
        match postcard::take_from_bytes(body) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(format!("{what} is followed by {} bytes that do not belong to it", rest.len())),
            Err(error) => Err(format!("{what} is damaged: {error}")),
        }
    }
}

/// A structure of KVM's ABI, which must arrive with exactly its length.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Exact<T>(pub(crate) T);

impl<T: Serialize> Serialize for Exact<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Exact<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = deserializer.deserialize_bytes(Borrowed)?;
        if bytes.len() != size_of::<T>() {
            return Err(D::Error::custom("a structure of the wrong length"));
        }
        T::deserialize(BorrowedBytesDeserializer::new(bytes)).map(Self)
    }
}

/// Bytes of a length that varies.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Blob(pub(crate) Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(Borrowed).map(|bytes| Self(bytes.to_vec()))
    }
}

/// Takes bytes that lie in the input, so that their length is known to be true.
struct Borrowed;

impl<'de> Visitor<'de> for Borrowed {
    type Value = &'de [u8];

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes of the input")
    }

    fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
        Ok(bytes)
    }
}

/// A list of at most `MAX` elements.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AtMost<T, const MAX: usize>(pub(crate) Vec<T>);

impl<T: Serialize, const MAX: usize> Serialize for AtMost<T, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for AtMost<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Elements::<T, MAX>(PhantomData)).map(Self)
    }
}

struct Elements<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Elements<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "at most {MAX} elements")
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let mut found = Vec::new();
        while let Some(element) = elements.next_element()? {
            if found.len() == MAX {
                return Err(A::Error::custom("a list that is too long"));
            }
            found.push(element);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_dtable;

    const FORMAT: Format = Format { what: "a test", magic: *b"PFTEST\0\0", version: 3 };

    type Value = (AtMost<Exact<kvm_dtable>, 4>, Blob);

    fn value() -> Value {
        (AtMost(vec![Exact(kvm_dtable { base: 1, limit: 2, ..Default::default() })]), Blob(vec![1, 2, 3]))
    }

    fn unpack(bytes: &[u8]) -> Result<Value, String> {
        FORMAT.unpack(bytes)
    }

    #[test]
    fn what_was_packed_comes_back() {
        assert_eq!(unpack(&FORMAT.pack(&value())), Ok(value()));
    }

    #[test]
    fn cut_and_prolonged_bytes_are_errors() {
        let bytes = FORMAT.pack(&value());
        for len in 0..bytes.len() {
            assert!(unpack(&bytes[..len]).is_err(), "{len}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(unpack(&longer).unwrap_err().contains("followed by 1 bytes"));
    }

    #[test]
    fn other_magic_and_other_versions_are_named() {
        let mut bytes = FORMAT.pack(&value());
        bytes[8] = 4;
        assert!(unpack(&bytes).unwrap_err().contains("version 4"));
        bytes[0] = b'X';
        assert!(unpack(&bytes).unwrap_err().contains("not a test"));
    }

    #[test]
    fn short_structures_long_lists_and_claimed_lengths_are_refused() {
        let pack = |body: &[u8]| [b"PFTEST\0\0\x03\0", body].concat();
        assert!(unpack(&pack(&[1, 0, 0])).is_err(), "a structure of no bytes");
        let five = AtMost::<_, 9>(vec![Exact(kvm_dtable::default()); 5]);
        assert!(unpack(&FORMAT.pack(&(five, Blob::default()))).is_err());
        assert!(unpack(&pack(&[0, 0xff, 0xff, 0xff, 0xff, 0x0f, 1])).is_err(), "4 GiB claimed, 1 byte there");
        assert!(unpack(&pack(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1])).is_err());
    }
}
