//! How sockets come and go, and what is said when they cannot.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer, LaneRole};
use pageferry_unix::{UnixAcceptor, UnixDialer};

const PATIENCE: Duration = Duration::from_secs(30);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A path that nothing has; what is there at the end is removed.
struct Path(PathBuf);

impl Path {
    fn new() -> Self {
        let name = format!("sockets-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }

    fn dial(&self, timeout: Duration) -> Result<(), String> {
        let dialled = UnixDialer::new(&self.0).dial(LaneRole::Control, timeout);
        dialled.map(|_| ()).map_err(|error| error.to_string())
    }

    fn bind(&self) -> Result<UnixAcceptor, String> {
        UnixAcceptor::bind(&self.0).map_err(|error| error.to_string())
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_socket_is_this_users_alone_and_goes_with_its_listener() {
    let path = Path::new();
    let acceptor = path.bind().unwrap();
    assert_eq!(fs::metadata(&path.0).unwrap().permissions().mode() & 0o777, 0o600);
    drop(acceptor);
    assert!(!path.0.exists());
}

#[test]
fn a_socket_that_was_left_behind_is_replaced() {
    let path = Path::new();
    drop(UnixListener::bind(&path.0).unwrap());
    assert!(path.0.exists());
    assert!(path.dial(PATIENCE).unwrap_err().contains("nobody listens there any more"));
    let acceptor = path.bind().unwrap();
    path.dial(PATIENCE).unwrap();
    let lane = acceptor.accept(PATIENCE).unwrap().expect("the caller waits");
    assert_eq!(lane.peer(), path.0.display().to_string());
}

#[test]
fn what_is_in_the_way_is_named_and_left_alone() {
    let path = Path::new();
    let first = path.bind().unwrap();
    assert!(path.bind().unwrap_err().contains("another program listens there"));
    path.dial(PATIENCE).unwrap();
    drop(first);
    fs::write(&path.0, "precious").unwrap();
    assert!(path.bind().unwrap_err().contains("is no socket"));
    assert_eq!(fs::read_to_string(&path.0).unwrap(), "precious");
}

#[test]
fn a_listener_does_not_remove_another_ones_socket() {
    let path = Path::new();
    let first = path.bind().unwrap();
    fs::remove_file(&path.0).unwrap();
    let _second = path.bind().unwrap();
    drop(first);
    path.dial(PATIENCE).unwrap();
}

#[test]
fn paths_that_cannot_be_dialled_are_explained() {
    let path = Path::new();
    let error = path.dial(PATIENCE).unwrap_err();
    assert!(error.contains("is the receiver running") && error.contains(&path.0.display().to_string()), "{error}");
    let long = Path(std::env::temp_dir().join("x".repeat(200)));
    assert!(long.dial(PATIENCE).unwrap_err().contains("107 bytes"));
    assert!(long.bind().unwrap_err().contains("107 bytes"));
}

#[test]
fn a_listener_that_takes_nobody_is_given_up() {
    let path = Path::new();
    let listener = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    listener.bind(&socket2::SockAddr::unix(&path.0).unwrap()).unwrap();
    listener.listen(0).unwrap();
    let _waiting = UnixStream::connect(&path.0).unwrap();
    let error = path.dial(Duration::from_millis(50)).unwrap_err();
    assert!(error.contains("takes no more connections"), "{error}");
}
