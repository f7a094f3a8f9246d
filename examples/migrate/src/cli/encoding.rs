//! Options for how pages are made small. None is needed for a good result.

use clap::Args;
use pageferry::config::{Compress, EncodeConfig};
use pageferry::encode::{MAX_LEVEL, MIN_LEVEL};
use pageferry::limits::MAX_ENCODERS;

use super::units::size;

/// How the source makes pages small, and what that may take.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Encoding")]
pub(crate) struct Encoding {
    /// How hard pages are compressed: `auto` measures what pays on this link, batch by batch; `off`; or a zstd level,
    /// -7 to 19
    #[arg(long, value_name = "auto|off|LEVEL", value_parser = compress, default_value = "auto",
          allow_negative_numbers = true)]
    pub(crate) compress: Compress,
    /// Threads that encode; without it, half of the host's cores, at most 8
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_ENCODERS)))]
    pub(crate) encoders: Option<u16>,
    /// How much these threads give way to others, the guest's vCPUs above all: 0 for not at all, to 19
    #[arg(long, value_name = "NICE", value_parser = clap::value_parser!(u8).range(0..=19), default_value = "0")]
    pub(crate) encoder_nice: u8,
    /// Memory for pages as they were last sent, so that only what changed in them is sent again; 0 for none
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "256M")]
    pub(crate) delta_cache: u64,
    /// Send a page even if the destination has another one with the same content
    #[arg(long)]
    pub(crate) no_duplicates: bool,
}

impl Encoding {
    /// The engine's own words for these choices.
    pub(crate) fn config(&self) -> EncodeConfig {
        let mut config = EncodeConfig::default();
        config.compress = self.compress;
        config.threads = self.encoders.unwrap_or(config.threads);
        config.duplicates = !self.no_duplicates;
        config.delta_cache = self.delta_cache;
        config
    }
}

/// Text that says no way of compressing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not auto, off, or a zstd level: {MIN_LEVEL} (fastest) to -1, or 1 to {MAX_LEVEL} (smallest)")]
struct CompressError(String);

fn compress(text: &str) -> Result<Compress, CompressError> {
    match text {
        "auto" => Ok(Compress::Auto),
        "off" => Ok(Compress::Off),
        _ => match text.parse() {
            // To zstd, 0 is another word for 3; to people it means off.
            Ok(level) if level != 0 && (MIN_LEVEL..=MAX_LEVEL).contains(&level) => Ok(Compress::Level(level)),
            _ => Err(CompressError(text.to_owned())),
        },
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    fn demo(options: &str) -> Result<Encoding, clap::Error> {
        let line = format!("migrate demo {options}");
        match Cli::try_parse_from(line.split_whitespace())?.command {
            Command::Demo(demo) => Ok(demo.encoding),
            other => panic!("not a demo: {other:?}"),
        }
    }

    #[test]
    fn without_options_it_is_what_the_engine_takes_for_best() {
        let (config, engine) = (demo("").unwrap().config(), EncodeConfig::default());
        assert_eq!((config.compress, config.threads), (engine.compress, engine.threads));
        assert_eq!((config.duplicates, config.delta_cache), (engine.duplicates, engine.delta_cache));
        assert_eq!(demo("").unwrap().encoder_nice, 0);
    }

    #[test]
    fn every_option_reaches_the_engine() {
        let encoding = demo("--compress -5 --encoders 3 --encoder-nice 10 --delta-cache 64M --no-duplicates").unwrap();
        let config = encoding.config();
        assert_eq!((config.compress, config.threads), (Compress::Level(-5), 3));
        assert_eq!((config.duplicates, config.delta_cache), (false, 64 << 20));
        assert_eq!(encoding.encoder_nice, 10);
        assert_eq!(demo("--delta-cache 0").unwrap().config().delta_cache, 0);
    }

    #[test]
    fn compression_is_a_word_or_a_level_that_zstd_has() {
        assert_eq!((compress("auto"), compress("off")), (Ok(Compress::Auto), Ok(Compress::Off)));
        for level in [-7, -1, 1, 19] {
            assert_eq!(compress(&level.to_string()), Ok(Compress::Level(level)));
        }
        for wrong in ["-8", "0", "20", "3.5", "best", ""] {
            let told = compress(wrong).unwrap_err().to_string();
            assert!(told.contains("auto, off") && told.contains("-7") && told.contains("19"), "{told}");
        }
    }
}
