//! The last stage: what is left of a batch, packed together.

use std::io;

use zstd::bulk::Compressor;

use crate::limits::MAX_PAYLOAD;

/// How hard a payload is packed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub enum Level {
    /// Not at all.
    #[default]
    Raw,
    /// A zstd level, [`MIN_LEVEL`] to [`MAX_LEVEL`].
    Zstd(i32),
}

/// The fastest zstd level that is of use.
pub const MIN_LEVEL: i32 = -7;

/// The strongest: what comes above needs more memory and time than a migration has.
pub const MAX_LEVEL: i32 = 19;

/// A payload shorter than this is not worth a call.
pub(super) const SMALLEST: usize = 64;

/// A payload shorter than this tells nothing about a level.
pub(super) const TELLING: usize = 64 << 10;

/// A packed payload must be smaller by one part in so many, or it travels as it is: unpacking costs the
/// destination more than so few bytes cost the link.
const LEAST_GAIN: usize = 256;

/// Packs payloads; each encoder has its own, which keeps zstd's tables.
#[derive(Default)]
pub(super) struct Packer {
    compressor: Option<(i32, Compressor<'static>)>,
}

impl Packer {
    /// Packs `payload` into `out`. `false` if it would not shrink: it goes raw then.
    pub(super) fn pack(&mut self, level: Level, payload: &[u8], out: &mut Vec<u8>) -> io::Result<bool> {
        let Level::Zstd(level) = level else { return Ok(false) };
        let compressor = match &mut self.compressor {
            Some((set, compressor)) => {
                if *set != level {
                    compressor.set_compression_level(level)?;
                    *set = level;
                }
                compressor
            }
            empty => &mut empty.insert((level, new_compressor(level)?)).1,
        };
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(MAX_PAYLOAD));
        compressor.compress_to_buffer(payload, out)?;
        Ok(out.len() + payload.len() / LEAST_GAIN < payload.len())
    }
}

fn new_compressor(level: i32) -> io::Result<Compressor<'static>> {
    let mut compressor = Compressor::new(level)?;
    // Length and checksum stand in our own frame.
    compressor.include_checksum(false)?;
    compressor.include_contentsize(false)?;
    compressor.include_dictid(false)?;
    Ok(compressor)
}
