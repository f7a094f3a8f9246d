//! What QEMU is told about a migration.

use std::str::FromStr;

use serde_json::{Value, json};

/// What the names of all settings of QEMU start with.
pub(crate) const QEMU_PREFIX: &str = "qemu-";

/// No limit: bytes per second.
const MOST_BANDWIDTH: u64 = 1 << 40;

/// Milliseconds; the default of both programs.
const DOWNTIME_LIMIT: u64 = 300;

/// The least and fastest level that QEMU has.
const ZSTD_LEVEL: u8 = 1;

/// Words joined by `+`: `plain`, `xbzrle`, `multifd-4`, `multifd-2-zstd`, `auto-converge`, `postcopy`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct QemuSetting {
    name: String,
    xbzrle: bool,
    multifd: Option<Multifd>,
    auto_converge: bool,
    postcopy: bool,
}

/// Pages over several connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Multifd {
    channels: u8,
    zstd: bool,
}

impl FromStr for QemuSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = format!("{QEMU_PREFIX}{text}");
        let mut setting = Self { name, xbzrle: false, multifd: None, auto_converge: false, postcopy: false };
        for word in text.split('+') {
            match word {
                "plain" if text == word => {}
                "xbzrle" => setting.xbzrle = true,
                "auto-converge" => setting.auto_converge = true,
                "postcopy" => setting.postcopy = true,
                _ => setting.multifd = Some(multifd(word).ok_or_else(|| unknown(text))?),
            }
        }
        // QEMU 7.2 refuses both.
        if setting.multifd.is_some() && (setting.xbzrle || setting.postcopy) { Err(unknown(text)) } else { Ok(setting) }
    }
}

fn unknown(text: &str) -> String {
    format!(
        "{text:?} is none of plain, xbzrle, multifd-CHANNELS, multifd-CHANNELS-zstd, auto-converge, postcopy, nor some of them \
         joined by + (multifd goes with auto-converge alone)"
    )
}

fn multifd(word: &str) -> Option<Multifd> {
    let (channels, codec) = match word.strip_prefix("multifd-")?.split_once('-') {
        Some((channels, codec)) => (channels, Some(codec)),
        None => (word.strip_prefix("multifd-")?, None),
    };
    let channels = channels.parse().ok().filter(|channels| *channels > 0)?;
    match codec {
        None => Some(Multifd { channels, zstd: false }),
        Some("zstd") => Some(Multifd { channels, zstd: true }),
        Some(_) => None,
    }
}

impl QemuSetting {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest is to run at the destination once every page was sent once.
    pub(super) fn switches_to_postcopy(&self) -> bool {
        self.postcopy
    }

    /// In words.
    pub(super) fn words(&self) -> String {
        let mut words = vec![match self.multifd {
            None => "one connection".to_owned(),
            Some(Multifd { channels, zstd: false }) => format!("multifd over {channels} connections"),
            Some(Multifd { channels, zstd: true }) => {
                format!("multifd over {channels} connections, zstd level {ZSTD_LEVEL}")
            }
        }];
        let more = [
            (self.xbzrle, "XBZRLE with its cache of 64 MiB"),
            (self.auto_converge, "auto-converge"),
            (self.postcopy, "post-copy after the first pass"),
        ];
        words.extend(more.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned()));
        words.push(format!("downtime limit {DOWNTIME_LIMIT} ms"));
        words.join(", ")
    }

    pub(super) fn capabilities(&self) -> Value {
        let on = |name: &str, state: bool| json!({"capability": name, "state": state});
        json!([
            on("events", true),
            on("xbzrle", self.xbzrle),
            on("multifd", self.multifd.is_some()),
            on("auto-converge", self.auto_converge),
            on("postcopy-ram", self.postcopy)
        ])
    }

    pub(super) fn parameters(&self) -> Value {
        let mut parameters = json!({"max-bandwidth": MOST_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT});
        if let Some(Multifd { channels, zstd }) = self.multifd {
            parameters["multifd-channels"] = channels.into();
            parameters["multifd-compression"] = if zstd { "zstd" } else { "none" }.into();
            if zstd {
                parameters["multifd-zstd-level"] = ZSTD_LEVEL.into();
            }
        }
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(text: &str) -> QemuSetting {
        text.parse().unwrap()
    }

    #[test]
    fn settings_have_names_that_qemu_is_told_about() {
        let zstd = setting("multifd-2-zstd");
        assert_eq!(zstd.name, "qemu-multifd-2-zstd");
        let parameters = zstd.parameters();
        assert_eq!((&parameters["multifd-channels"], &parameters["multifd-compression"]), (&json!(2), &json!("zstd")));
        assert_eq!(parameters["multifd-zstd-level"], 1);
        assert!(setting("plain").parameters().get("multifd-channels").is_none());
        let on = |text: &str, name: &str| {
            setting(text).capabilities().as_array().unwrap().contains(&json!({"capability": name, "state": true}))
        };
        assert!(on("multifd-4", "multifd") && !on("plain", "multifd") && !on("plain", "xbzrle"));
        assert!(on("xbzrle+auto-converge", "xbzrle") && on("xbzrle+auto-converge", "auto-converge"));
        assert!(on("postcopy", "postcopy-ram") && setting("postcopy").switches_to_postcopy());
        assert!(setting("multifd-2-zstd+auto-converge").words().contains("zstd level 1, auto-converge, downtime"));
    }

    #[test]
    fn what_qemu_has_not_is_refused() {
        for text in [
            "",
            "multifd",
            "multifd-0",
            "multifd-2-lz4",
            "multifd-2-zstd-9",
            "plain-2",
            "plain+xbzrle",
            "multifd-2+postcopy",
            "xbzrle+multifd-2",
            "xbzrle+",
        ] {
            assert!(text.parse::<QemuSetting>().is_err(), "{text}");
        }
    }
}
