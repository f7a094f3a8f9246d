//! What is said about a folder of PEM files that cannot serve, when it is read.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use common::{Ca, Folder};
use pageferry_tls::{DestinationIdentity, SourceIdentity};
use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};

/// What both sides say; it must be the same.
fn complaint(folder: &Folder) -> String {
    let source = SourceIdentity::from_pem_dir(folder.path()).unwrap_err().to_string();
    let destination = DestinationIdentity::from_pem_dir(folder.path()).unwrap_err().to_string();
    assert_eq!(source, destination);
    source
}

#[test]
fn a_folder_as_it_should_be_serves_both_sides() {
    let folder = Ca::new("the CA").folder(&["somewhere.example"], |_| ());
    SourceIdentity::from_pem_dir(folder.path()).unwrap();
    DestinationIdentity::from_pem_dir(folder.path()).unwrap();
}

#[test]
fn files_that_are_missing_are_named() {
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        let folder = Ca::new("the CA").folder(&["a.example"], |_| ());
        fs::remove_file(folder.path().join(name)).unwrap();
        let said = complaint(&folder);
        assert!(said.contains(&format!("{name} does not exist")), "{said}");
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        let folder = Ca::new("the CA").folder(&["a.example"], |_| ());
        fs::remove_file(folder.path().join(name)).unwrap();
        fs::create_dir(folder.path().join(name)).unwrap();
        fs::set_permissions(folder.path().join(name), Permissions::from_mode(0o700)).unwrap();
        let said = complaint(&folder);
        assert!(said.contains(&format!("{name} cannot be read")), "{said}");
    }
}

#[test]
fn files_that_hold_something_else_are_named() {
    for (name, what) in [("ca.pem", "certificate"), ("cert.pem", "certificate"), ("key.pem", "private key")] {
        for content in
            ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA", "-----BEGIN EMPTY-----\n-----END EMPTY-----\n"]
        {
            let folder = Ca::new("the CA").folder(&["a.example"], |_| ());
            folder.write(name, content);
            let said = complaint(&folder);
            assert!(said.contains(&format!("{name} holds no {what} in PEM form")), "{content:?}: {said}");
        }
    }
    let folder = Ca::new("the CA").folder(&["a.example"], |_| ());
    folder.write("ca.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let said = complaint(&folder);
    assert!(said.contains("ca.pem holds no CA certificate"), "{said}");
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    for mode in [0o604, 0o640, 0o644, 0o620, 0o777] {
        let folder = Ca::new("the CA").folder(&["a.example"], |_| ());
        fs::set_permissions(folder.path().join("key.pem"), Permissions::from_mode(mode)).unwrap();
        let said = complaint(&folder);
        assert!(said.contains("can be read by others") && said.contains(&format!("{mode:03o}")), "{said}");
        assert!(said.contains("chmod 600"), "{said}");
    }
}

#[test]
fn a_certificate_out_of_its_time_is_found_before_any_migration() {
    let expired = Ca::new("the CA").folder(&["a.example"], |params| params.not_after = date_time_ymd(2021, 1, 1));
    let said = complaint(&expired);
    assert!(said.contains("cert.pem has expired (") && said.contains("days ago"), "{said}");
    let early = Ca::new("the CA").folder(&["a.example"], |params| params.not_before = date_time_ymd(4000, 1, 1));
    let said = complaint(&early);
    assert!(said.contains("cert.pem is not valid yet (") && said.contains("days to go"), "{said}");
}

#[test]
fn a_certificate_of_another_ca_is_found_before_any_migration() {
    for other in ["another CA", "the CA"] {
        let folder = Ca::new("the CA").folder(&["a.example"], |_| ());
        folder.write("ca.pem", &Ca::new(other).pem);
        let said = complaint(&folder);
        assert!(said.contains("cert.pem is not signed by the CA in ca.pem"), "{other}: {said}");
    }
}

#[test]
fn a_key_of_another_certificate_is_found_before_any_migration() {
    let ca = Ca::new("the CA");
    let folder = ca.folder(&["a.example"], |_| ());
    folder.write("key.pem", &ca.issue(&["a.example"], |_| ()).key.serialize_pem());
    let said = complaint(&folder);
    assert!(said.contains("key.pem is not the key of cert.pem"), "{said}");
}

#[test]
fn a_certificate_for_the_other_side_alone_is_found_before_any_migration() {
    let ca = Ca::new("the CA");
    let only = |purpose| ca.folder(&["a.example"], |params| params.extended_key_usages = vec![purpose]);
    let said = SourceIdentity::from_pem_dir(only(ExtendedKeyUsagePurpose::ServerAuth).path()).unwrap_err().to_string();
    assert!(said.contains("extended key usages"), "{said}");
    DestinationIdentity::from_pem_dir(only(ExtendedKeyUsagePurpose::ServerAuth).path()).unwrap();
    let wrong = DestinationIdentity::from_pem_dir(only(ExtendedKeyUsagePurpose::ClientAuth).path());
    assert!(wrong.unwrap_err().to_string().contains("extended key usages"));
}

#[test]
fn a_name_that_no_certificate_can_have_is_refused() {
    let said = Ca::new("the CA").source().expecting("not a name").unwrap_err().to_string();
    assert!(said.contains("neither a host name nor an address"), "{said}");
}
