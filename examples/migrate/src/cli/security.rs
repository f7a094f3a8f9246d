//! Who may speak to whom over a network.

use std::path::PathBuf;

use clap::Args;

/// How both ends make sure of each other. Nothing here is needed within one host, or with the string that a receiver prints.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Security")]
pub(crate) struct Security {
    /// Folder with this host's certificate and key and the CA of the other's: cert.pem, key.pem (for nobody else to
    /// read) and ca.pem. Without it a receiver makes a fresh key and prints a string that admits one sender
    #[arg(long, value_name = "FOLDER")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Send the guest's memory as it is, readable and changeable for everybody on the way, to anybody who answers
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
}
