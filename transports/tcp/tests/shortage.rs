//! A host without free descriptors: accepting waits and recovers. Alone in its process, because it
//! takes all descriptors there are.

mod common;

use std::fs::File;
use std::net::TcpStream;
use std::time::Duration;

use common::{PATIENCE, listener};
use pageferry::transport::Acceptor;

/// Processor time of this process, in clock ticks.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn running_out_of_descriptors_neither_spins_nor_ends_the_listener() {
    let acceptor = listener("127.0.0.1:0");
    let _caller = TcpStream::connect(acceptor.local_addr()).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
        if hoard.len() > 200_000 {
            drop(std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("skipped: this host has no limit on descriptors worth the name\n"),
            ));
            return;
        }
    }
    // One back, for /proc below.
    hoard.pop();
    let before = ticks();
    hoard.push(File::open("/dev/null").unwrap());
    assert!(acceptor.accept(Duration::from_secs(1)).unwrap().is_none());
    hoard.pop();
    assert!(ticks() - before < 50, "it kept the processor busy for most of the wait");
    hoard.clear();
    assert!(acceptor.accept(PATIENCE).unwrap().is_some());
}
