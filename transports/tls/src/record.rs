//! Records of an open connection, sealed from the parts of a frame and opened into its buffer.
//!
//! rustls shakes hands, judges certificates and derives all keys, also when they are changed. Its own records would be
//! copied twice on their way out and once on their way in, which is a seventh of what a lane costs (benches/NOTES.md).
//! What is left to do here is RFC 8446, section 5: the header, the nonce, the content type, and the few messages that may
//! come after the handshake.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, ExtractedSecrets, SupportedCipherSuite};

use crate::connection::{Outgoing, RECORD};

/// Content type, version, and the length of what follows.
const HEADER: usize = 5;

/// Of all ciphers of TLS 1.3.
const TAG: usize = 16;

/// What a record of TLS 1.3 may hold beyond its plaintext: content type, padding, tag.
const MOST_EXPANSION: usize = 256;

/// What every header says, whatever is inside.
const OUTER_TYPE: u8 = APPLICATION_DATA;
const VERSION: [u8; 2] = [3, 3];

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// Levels of alerts; receivers go by the description alone.
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// A change of the sender's keys: type, length, and whether the receiver has to change its own too.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];
const NOT_REQUESTED: u8 = 0;
const REQUESTED: u8 = 1;

/// Where rustls has the next keys of a connection.
pub(crate) enum Keys {
    Source(KernelConnection<ClientConnectionData>),
    Destination(KernelConnection<ServerConnectionData>),
}

impl Keys {
    fn next_to_send(&mut self) -> Result<Cipher, Error> {
        match self {
            Self::Source(keys) => keys.update_tx_secret(),
            Self::Destination(keys) => keys.update_tx_secret(),
        }
        .and_then(Cipher::new)
    }

    fn next_to_receive(&mut self) -> Result<Cipher, Error> {
        match self {
            Self::Source(keys) => keys.update_rx_secret(),
            Self::Destination(keys) => keys.update_rx_secret(),
        }
        .and_then(Cipher::new)
    }

    fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Source(keys) => keys.negotiated_cipher_suite(),
            Self::Destination(keys) => keys.negotiated_cipher_suite(),
        }
    }
}

/// What both directions need of each other.
struct Shared {
    keys: Mutex<Keys>,
    /// The peer has asked for a change of the keys that we send with.
    asked: AtomicBool,
}

impl Shared {
    fn next(&self, cipher: impl FnOnce(&mut Keys) -> Result<Cipher, Error>) -> Result<Cipher, Error> {
        cipher(&mut self.keys.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Both directions of a connection on which not a record is under way.
pub(crate) fn directions(secrets: ExtractedSecrets, keys: Keys) -> Result<(Sealer, Opener), Error> {
    let ExtractedSecrets { tx, rx } = secrets;
    let limit = keys.suite().tls13().map_or(0, |suite| suite.common.confidentiality_limit);
    let shared = Arc::new(Shared { keys: Mutex::new(keys), asked: false.into() });
    let sealer = Sealer { cipher: Cipher::new(tx)?, limit, shared: Arc::clone(&shared) };
    Ok((sealer, Opener { cipher: Cipher::new(rx)?, shared }))
}

/// A key, and the number of the next record under it.
struct Cipher {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Cipher {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher that this version does not know".to_owned())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| Error::EncryptError)?;
        let iv = iv.as_ref().try_into().map_err(|_| Error::EncryptError)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// That of the next record: the record's number over the initial vector (RFC 8446, 5.3). No number comes twice.
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let number = self.sequence;
        self.sequence = number.checked_add(1).ok_or(Error::EncryptError)?;
        let mut nonce = self.iv;
        for (byte, of_number) in nonce[NONCE_LEN - 8..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= of_number;
        }
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// The sending direction.
pub(crate) struct Sealer {
    cipher: Cipher,
    /// So many records may be sent under one key.
    limit: u64,
    shared: Arc<Shared>,
}

impl Sealer {
    /// Seals data, after a change of keys if one is due.
    pub(crate) fn seal(&mut self, data: &[u8], outgoing: &mut Outgoing) -> Result<(), Error> {
        for piece in data.chunks(RECORD) {
            if self.cipher.sequence >= self.limit || self.shared.asked.load(Ordering::Acquire) {
                self.change_keys(outgoing)?;
            }
            self.record(APPLICATION_DATA, piece, outgoing)?;
        }
        Ok(())
    }

    /// Says that no more will come.
    pub(crate) fn goodbye(&mut self, outgoing: &mut Outgoing) -> Result<(), Error> {
        self.record(ALERT, &[WARNING, AlertDescription::CloseNotify.into()], outgoing)
    }

    /// Says why this is the end.
    pub(crate) fn alert(&mut self, error: &Error, outgoing: &mut Outgoing) -> Result<(), Error> {
        let description = match error {
            Error::AlertReceived(_) => return Ok(()),
            Error::DecryptError => AlertDescription::BadRecordMac,
            Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
            _ => AlertDescription::UnexpectedMessage,
        };
        self.record(ALERT, &[FATAL, description.into()], outgoing)
    }

    fn change_keys(&mut self, outgoing: &mut Outgoing) -> Result<(), Error> {
        let [a, b, c, d] = KEY_UPDATE;
        self.record(HANDSHAKE, &[a, b, c, d, NOT_REQUESTED], outgoing)?;
        self.shared.asked.store(false, Ordering::Release);
        self.cipher = self.shared.next(Keys::next_to_send)?;
        Ok(())
    }

    fn record(&mut self, content: u8, plaintext: &[u8], outgoing: &mut Outgoing) -> Result<(), Error> {
        let sealed = plaintext.len() + 1 + TAG;
        let header = header(sealed);
        let nonce = self.cipher.nonce()?;
        let room = outgoing.room(HEADER + sealed);
        let (head, body) = room.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (ciphertext, rest) = body.split_at_mut(plaintext.len());
        let sealing = self.cipher.key.seal_out_of_place_scatter(
            nonce,
            Aad::from(header),
            plaintext,
            ciphertext,
            &[content],
            rest,
        );
        sealing.map_err(|_| Error::EncryptError)?;
        outgoing.keep(HEADER + sealed);
        Ok(())
    }
}

fn header(sealed: usize) -> [u8; HEADER] {
    let [high, low] = (sealed as u16).to_be_bytes();
    [OUTER_TYPE, VERSION[0], VERSION[1], high, low]
}

/// What the first of the received records is.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Opened {
    /// It has not come whole.
    Starved,
    /// So many bytes were used up, and so many of data are where they were wanted.
    Placed { used: usize, len: usize },
    /// So many bytes were used up, and this part of them is now the data.
    Held { used: usize, data: Range<usize> },
    /// The peer will send no more.
    PeerClosed,
}

/// The receiving direction.
pub(crate) struct Opener {
    cipher: Cipher,
    shared: Arc<Shared>,
}

impl Opener {
    /// Opens the first record of `incoming`: into `into` if it fits there, otherwise where it lies. What stands behind
    /// the data in `into`, and all of it after an error, is worth nothing.
    pub(crate) fn open(&mut self, incoming: &mut [u8], into: &mut [u8]) -> Result<Opened, Error> {
        let Some((&header, rest)) = incoming.split_first_chunk::<HEADER>() else { return Ok(Opened::Starved) };
        let [outer, _, _, high, low] = header;
        let sealed = usize::from(u16::from_be_bytes([high, low]));
        if outer != OUTER_TYPE {
            return Err(unexpected("a record that is not encrypted"));
        }
        if sealed > RECORD + MOST_EXPANSION {
            return Err(Error::PeerSentOversizedRecord);
        }
        if rest.len() < sealed {
            return Ok(Opened::Starved);
        }
        let used = HEADER + sealed;
        let inner = sealed.checked_sub(TAG).filter(|inner| *inner > 0).ok_or(Error::DecryptError)?;
        let nonce = self.cipher.nonce()?;
        let body = &mut incoming[HEADER..used];
        if inner <= into.len() {
            let (ciphertext, tag) = body.split_at(inner);
            let opening =
                self.cipher.key.open_separate_gather(nonce, Aad::from(header), ciphertext, tag, &mut into[..inner]);
            opening.map_err(|_| Error::DecryptError)?;
            let (content, len) = content(&into[..inner])?;
            return self.take(content, &into[..len], Opened::Placed { used, len }, used);
        }
        let opening = self.cipher.key.open_in_place(nonce, Aad::from(header), body);
        let plaintext = opening.map_err(|_| Error::DecryptError)?;
        let (content, len) = content(plaintext)?;
        self.take(content, &plaintext[..len], Opened::Held { used, data: HEADER..HEADER + len }, used)
    }

    /// Sees to what is not data.
    fn take(&mut self, content: u8, message: &[u8], data: Opened, used: usize) -> Result<Opened, Error> {
        match (content, message) {
            (APPLICATION_DATA, _) => return Ok(data),
            (ALERT, &[_, description]) => match AlertDescription::from(description) {
                AlertDescription::CloseNotify => return Ok(Opened::PeerClosed),
                AlertDescription::UserCanceled => {}
                other => return Err(Error::AlertReceived(other)),
            },
            (HANDSHAKE, &[a, b, c, d, wish @ (NOT_REQUESTED | REQUESTED)]) if [a, b, c, d] == KEY_UPDATE => {
                self.cipher = self.shared.next(Keys::next_to_receive)?;
                if wish == REQUESTED {
                    self.shared.asked.store(true, Ordering::Release);
                }
            }
            _ => return Err(unexpected("a message that has no place after the handshake")),
        }
        Ok(Opened::Placed { used, len: 0 })
    }
}

/// The content type, which is the last byte that is not padding, and the bytes before it.
fn content(inner: &[u8]) -> Result<(u8, usize), Error> {
    let last = inner.iter().rposition(|byte| *byte != 0).ok_or_else(|| unexpected("a record of padding alone"))?;
    if last > RECORD {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok((inner[last], last))
}

fn unexpected(what: &str) -> Error {
    Error::General(format!("the peer sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Connection, Next};
    use crate::identity::{DestinationIdentity, SourceIdentity};

    /// Both ends of a connection, with rustls' own records.
    fn connections() -> (Connection, Connection) {
        let destination = DestinationIdentity::for_pairing().unwrap();
        let source = SourceIdentity::from_pairing(destination.pairing().unwrap()).unwrap();
        let mut source = Connection::source(source.tls(), source.server_name("host:1").unwrap()).unwrap();
        let mut destination = Connection::destination(destination.tls()).unwrap();
        while !(source.is_open() && destination.is_open()) {
            assert!(pass(&mut source, &mut destination).is_empty());
            assert!(pass(&mut destination, &mut source).is_empty());
        }
        (source, destination)
    }

    /// Lets `to` work on what `from` wants sent, and returns the data that was in it.
    fn pass(from: &mut Connection, to: &mut Connection) -> Vec<u8> {
        let mut data = hear(from, &mut []);
        let mut bytes = from.replies.bytes().to_vec();
        from.replies.clear();
        data.extend(hear(to, &mut bytes));
        data
    }

    fn hear(connection: &mut Connection, mut bytes: &mut [u8]) -> Vec<u8> {
        let mut data = Vec::new();
        loop {
            let (used, next) = connection.advance(bytes, &mut |part| data.extend_from_slice(part)).unwrap();
            bytes = &mut bytes[used..];
            if next != Next::Again {
                assert!(bytes.is_empty() && next == Next::Starved);
                return data;
            }
        }
    }

    type Direction = (Sealer, Opener);

    /// Both ends with our records: from the source, and to it.
    fn ends() -> (Direction, Direction) {
        let (source, destination) = connections();
        let (source, destination) = (source.into_directions().unwrap(), destination.into_directions().unwrap());
        ((source.0, destination.1), (destination.0, source.1))
    }

    fn data(len: usize) -> Vec<u8> {
        (0..len).map(|index| (index * 7 % 251) as u8).collect()
    }

    fn sealed(sealer: &mut Sealer, data: &[u8]) -> Vec<u8> {
        let mut outgoing = Outgoing::default();
        sealer.seal(data, &mut outgoing).unwrap();
        outgoing.bytes().to_vec()
    }

    /// All data, where at most `window` bytes are wanted at a time.
    fn opened(opener: &mut Opener, mut bytes: Vec<u8>, window: usize) -> Vec<u8> {
        let (mut data, mut start, mut into) = (Vec::new(), 0, vec![0xee; window]);
        loop {
            let incoming = &mut bytes[start..];
            match opener.open(incoming, &mut into).unwrap() {
                Opened::Starved => {
                    assert!(incoming.is_empty());
                    return data;
                }
                Opened::Placed { used, len } => {
                    data.extend_from_slice(&into[..len]);
                    start += used;
                }
                Opened::Held { used, data: at } => {
                    data.extend_from_slice(&incoming[at]);
                    start += used;
                }
                Opened::PeerClosed => panic!("nobody has said so"),
            }
        }
    }

    #[test]
    fn data_of_every_length_arrives_wherever_it_is_wanted() {
        let (mut there, mut back) = ends();
        for len in [1, 2, 100, RECORD - 1, RECORD, RECORD + 1, 3 * RECORD, 100_000] {
            for window in [0, 1, len, len + 1, RECORD, RECORD + 1, 200_000] {
                for (sealer, opener) in [&mut there, &mut back] {
                    let bytes = sealed(sealer, &data(len));
                    assert!(opened(opener, bytes, window) == data(len), "{len} {window}");
                }
            }
        }
    }

    #[test]
    fn records_are_those_of_rustls_and_keys_change_at_the_limit() {
        for (ours_is_source, bytes) in [(true, 90_000), (false, 90_000)] {
            let (source, destination) = connections();
            let (ours, mut theirs) = if ours_is_source { (source, destination) } else { (destination, source) };
            let (mut sealer, mut opener) = ours.into_directions().unwrap();
            let data = data(bytes);
            for _ in 0..3 {
                sealer.limit = 2;
                let mut records = sealed(&mut sealer, &data);
                // Six of data, and a change before every third.
                assert!(records.len() > data.len() + 8 * (HEADER + TAG));
                assert!(hear(&mut theirs, &mut records) == data);
                let mut outgoing = Outgoing::default();
                theirs.seal(&data, &mut outgoing).unwrap();
                assert!(opened(&mut opener, outgoing.bytes().to_vec(), RECORD + 1) == data);
            }
        }
    }

    #[test]
    fn no_bit_can_be_changed_and_no_record_played_back() {
        let (mut there, _) = ends();
        let record = sealed(&mut there.0, &data(40));
        for at in 0..record.len() * 8 {
            let mut changed = record.clone();
            changed[at / 8] ^= 1 << (at % 8);
            for window in [10, 100] {
                let (sequence, mut into) = (there.1.cipher.sequence, vec![0; window]);
                match there.1.open(&mut changed.clone(), &mut into) {
                    // A length that says that more will come.
                    Ok(Opened::Starved) => assert!((24..40).contains(&at)),
                    Ok(other) => panic!("{other:?} with bit {at} changed"),
                    Err(_) => {}
                }
                there.1.cipher.sequence = sequence;
            }
        }
        assert!(opened(&mut there.1, record.clone(), 100) == data(40));
        assert_eq!(there.1.open(&mut record.clone(), &mut [0; 100]), Err(Error::DecryptError));
    }

    #[test]
    fn what_has_no_place_after_the_handshake_is_refused() {
        let refused = |record: &mut dyn FnMut(&mut Sealer, &mut Outgoing)| {
            let ((mut sealer, mut opener), _) = ends();
            let mut outgoing = Outgoing::default();
            record(&mut sealer, &mut outgoing);
            opener.open(&mut outgoing.bytes().to_vec(), &mut [0; 64]).unwrap_err().to_string()
        };
        let ticket = [4, 0, 0, 1, 0];
        let wish_unknown = [24, 0, 0, 1, 2];
        let two_messages = [KEY_UPDATE, [0, 0, 0, 0]].concat();
        for message in [&ticket[..], &wish_unknown, &two_messages, &[24, 0]] {
            let said = refused(&mut |sealer, outgoing| sealer.record(HANDSHAKE, message, outgoing).unwrap());
            assert!(said.contains("no place after the handshake"), "{said}");
        }
        let said = refused(&mut |sealer, outgoing| sealer.record(0, &[0; 9], outgoing).unwrap());
        assert!(said.contains("padding alone"), "{said}");
        let said =
            refused(&mut |sealer, outgoing| sealer.record(APPLICATION_DATA, &vec![0; RECORD + 1], outgoing).unwrap());
        assert_eq!(said, Error::PeerSentOversizedRecord.to_string());
        let said = refused(&mut |_, outgoing| {
            outgoing.room(HEADER).copy_from_slice(&[OUTER_TYPE, 3, 3, 0xff, 0xff]);
            outgoing.keep(HEADER);
        });
        assert_eq!(said, Error::PeerSentOversizedRecord.to_string());
        let said = refused(&mut |_, outgoing| {
            outgoing.room(HEADER + 1).copy_from_slice(&[OUTER_TYPE, 3, 3, 0, 1, 0]);
            outgoing.keep(HEADER + 1);
        });
        assert_eq!(said, Error::DecryptError.to_string());
        let said = refused(&mut |sealer, outgoing| sealer.alert(&Error::DecryptError, outgoing).unwrap());
        assert_eq!(said, Error::AlertReceived(AlertDescription::BadRecordMac).to_string());
    }

    #[test]
    fn the_end_is_told() {
        let ((mut sealer, mut opener), _) = ends();
        let mut outgoing = Outgoing::default();
        sealer.goodbye(&mut outgoing).unwrap();
        let mut bytes = outgoing.bytes().to_vec();
        assert_eq!(opener.open(&mut bytes[..9].to_vec(), &mut []), Ok(Opened::Starved));
        assert_eq!(opener.open(&mut bytes, &mut []), Ok(Opened::PeerClosed));
    }
}
