//! What the destination says to a source that has authenticated, in one byte.

/// Whether the source is let in.
pub type Verdict = Result<(), Refusal>;

/// Why a source is not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It does not know the token.
    #[error("the destination does not accept the token: use the string that the receiver prints now")]
    WrongToken,
    /// Another source has shown the token before.
    #[error(
        "the token has already been used by another source: if that was not you, start the receiver anew and give its new string to nobody else"
    )]
    TokenTaken,
    /// Wrong tokens came from its address.
    #[error(
        "too many wrong tokens came from this host's address: the destination lets nobody from here try again for up to a minute"
    )]
    TooManyAttempts,
    /// Something that this version does not know.
    #[error("the destination refused for a reason that this version does not know ({0})")]
    Unknown(u8),
}

const ACCEPTED: u8 = 1;

/// The verdict as the byte that is sent.
pub fn verdict_byte(verdict: Verdict) -> u8 {
    match verdict {
        Ok(()) => ACCEPTED,
        Err(Refusal::WrongToken) => 2,
        Err(Refusal::TokenTaken) => 3,
        Err(Refusal::TooManyAttempts) => 4,
        Err(Refusal::Unknown(byte)) => byte,
    }
}

/// The verdict that a byte stands for.
pub fn verdict_of(byte: u8) -> Verdict {
    match byte {
        ACCEPTED => Ok(()),
        2 => Err(Refusal::WrongToken),
        3 => Err(Refusal::TokenTaken),
        4 => Err(Refusal::TooManyAttempts),
        other => Err(Refusal::Unknown(other)),
    }
}
