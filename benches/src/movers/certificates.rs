//! Certificates for the two hosts of a run: what `migrate --tls-dir` wants.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::network::Side;
use crate::scratch::Scratch;
use crate::{BenchError, host};

/// A folder for each side, in the scratch folder; made once.
pub(super) fn folder(scratch: &Scratch, side: Side) -> Result<PathBuf, BenchError> {
    let both = scratch.once("certificates", |folder| make(folder).map_err(host("cannot make certificates")))?;
    Ok(both.join(side.address()))
}

fn make(folder: &Path) -> io::Result<()> {
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).map_err(io::Error::other)?;
    let issuer = Issuer::new(params, key);
    for side in [Side::Source, Side::Destination] {
        let address = side.address();
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let params = CertificateParams::new(vec![address.clone(), "127.0.0.1".to_owned()]).map_err(io::Error::other)?;
        let certificate = params.signed_by(&key, &issuer).map_err(io::Error::other)?;
        let own = folder.join(address);
        fs::create_dir_all(&own)?;
        fs::write(own.join("ca.pem"), ca.pem())?;
        fs::write(own.join("cert.pem"), certificate.pem())?;
        let mut options = fs::OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(own.join("key.pem"))?;
        io::Write::write_all(&mut file, key.serialize_pem().as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_have_what_they_need_to_trust_each_other() {
        let scratch = Scratch::new().unwrap();
        let (source, destination) =
            (folder(&scratch, Side::Source).unwrap(), folder(&scratch, Side::Destination).unwrap());
        assert!(source != destination);
        pageferry_tls::SourceIdentity::from_pem_dir(source).unwrap();
        pageferry_tls::DestinationIdentity::from_pem_dir(destination).unwrap();
    }
}
