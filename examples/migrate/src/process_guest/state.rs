//! What moves besides memory: the description sent ahead, and the counters saved at the pause.

use std::io::{self, Read};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ProcessGuestError;
use super::heart::HeartState;
use crate::workload::params::Params;

/// Raised when either structure changes.
const VERSION: u16 = 2;

/// Most bytes read of a peer's state: counters of 255 vCPUs are far below.
const STATE_MAX: u64 = 64 << 10;

/// What the destination must know before it can make room.
#[derive(Serialize, Deserialize, Debug)]
pub(super) struct Description {
    version: u16,
    /// The workload's command line.
    params: String,
    /// Hashes of the memory image that the guest was made of, if it was.
    image: Option<Vec<u128>>,
}

impl Description {
    pub(super) fn of(params: &Params, image: Option<Vec<u128>>) -> Self {
        Self { version: VERSION, params: params.to_string(), image }
    }

    /// The workload, and the hashes of the image.
    pub(super) fn read(bytes: &[u8]) -> Result<(Params, Option<Vec<u128>>), ProcessGuestError> {
        let what = "description of the guest";
        let described: Self = parse(what, bytes)?;
        let invalid = |why| ProcessGuestError::Invalid { what, why };
        if described.version != VERSION {
            return Err(invalid(format!("it is of version {}, not {VERSION}", described.version)));
        }
        let params = Params::parse(&described.params).map_err(|bad| invalid(format!("{:?}", bad.0)))?;
        if params.vcpus > 255 {
            return Err(invalid(format!("{} vCPUs", params.vcpus)));
        }
        match described.image {
            Some(hashes) if hashes.len() != params.vcpus as usize || !params.is_idle() => {
                Err(invalid(format!("{} hashes of an image, of a guest that is {params}", hashes.len())))
            }
            image => Ok((params, image)),
        }
    }
}

/// The machine state.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(super) struct State {
    /// Steps that each vCPU has made: what every page must hold follows from them.
    pub(super) steps: Vec<u64>,
    pub(super) heart: HeartState,
}

impl State {
    pub(super) fn read(from: &mut dyn io::Read) -> Result<Self, ProcessGuestError> {
        let what = "machine state";
        let mut bytes = Vec::new();
        from.take(STATE_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| ProcessGuestError::Invalid { what, why: error.to_string() })?;
        parse(what, &bytes)
    }
}

/// The bytes of either.
pub(super) fn bytes_of(value: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_stdvec(value)
}

fn parse<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, ProcessGuestError> {
    let invalid = |why: String| ProcessGuestError::Invalid { what, why };
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(invalid(format!("{} bytes follow its end", rest.len()))),
        Err(error) => Err(invalid(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::params::Rate;

    #[test]
    fn description_and_state_come_back_as_they_were() {
        let params = Params { seed: 77, vcpus: 3, ..Params::default() };
        let bytes = bytes_of(&Description::of(&params, None)).unwrap();
        assert_eq!(Description::read(&bytes).unwrap(), (params, None));
        let (idle, hashes) = (Params { rate: Rate::BytesPerSecond(0), ..params }, Some(vec![0, 1, u128::MAX]));
        let bytes = bytes_of(&Description::of(&idle, hashes.clone())).unwrap();
        assert_eq!(Description::read(&bytes).unwrap(), (idle, hashes));
        let state = State { steps: vec![1, u64::MAX], heart: HeartState::default() };
        let bytes = bytes_of(&state).unwrap();
        assert_eq!(State::read(&mut bytes.as_slice()).unwrap(), state);
    }

    #[test]
    fn bytes_that_are_cut_or_too_many_or_of_another_version_are_refused() {
        let params = Params::default();
        let mut bytes = bytes_of(&Description::of(&params, None)).unwrap();
        assert!(Description::read(&bytes[..bytes.len() - 1]).is_err());
        bytes[0] = 9;
        assert!(Description::read(&bytes).unwrap_err().to_string().contains("version 9"));
        let idle = Params { rate: Rate::BytesPerSecond(0), vcpus: 2, ..params };
        for (params, hashes) in [(idle, vec![1]), (idle, vec![1, 2, 3]), (Params { vcpus: 2, ..params }, vec![1, 2])] {
            let bytes = bytes_of(&Description::of(&params, Some(hashes))).unwrap();
            assert!(Description::read(&bytes).unwrap_err().to_string().contains("hashes of an image"), "{params}");
        }
        assert!(State::read(&mut io::repeat(0x80)).is_err());
        assert!(State::read(&mut [0, 0, 0, 0].as_slice()).is_err());
    }
}
