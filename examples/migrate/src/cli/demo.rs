//! What a demonstration may travel by.

use clap::ValueEnum;

/// A transport between two processes of this host.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum DemoTransport {
    /// Plain TCP over loopback
    #[default]
    Tcp,
    /// TLS 1.3 over TCP; the two processes pair
    Tls,
    /// QUIC, paired in the same way
    Quic,
    /// RDMA over this host's first address that has it
    Rdma,
    /// A Unix socket
    Unix,
    /// A Unix socket, over which the guest's memory is handed over instead of copied
    Memfd,
    /// A file, from which the second process restores the guest
    File,
    /// TCP over two paths at once
    Paths,
}

impl DemoTransport {
    /// Where the destination is to listen.
    pub(crate) fn listen(self) -> String {
        match self {
            Self::Tcp => "tcp://127.0.0.1:0".to_owned(),
            Self::Tls => "tls://127.0.0.1:0".to_owned(),
            Self::Quic => "quic://127.0.0.1:0".to_owned(),
            Self::Rdma => "rdma://127.0.0.1:0".to_owned(),
            Self::Unix | Self::Memfd => format!("unix:{}", temporary("sock")),
            Self::File => format!("file:{}", temporary("save")),
            Self::Paths => "tcp://127.0.0.1:0,tcp://127.0.0.2:0".to_owned(),
        }
    }
}

fn temporary(kind: &str) -> String {
    let name = format!("pageferry-demo-{}.{kind}", std::process::id());
    std::env::temp_dir().join(name).display().to_string()
}
