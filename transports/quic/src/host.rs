//! The runtime and the endpoint of one end. They live as long as the end or any of its lanes, and a little longer if what
//! was said last is still on its way.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{fmt, io};

use pageferry::host::{Joiner, Spawner, ThreadRole};
use pageferry::transport::TransportError;
use quinn::{Connection, Endpoint, RecvStream, SendStream, ServerConfig, TokioRuntime, VarInt};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::options::QuicOptions;
use crate::wait::wait_for;

/// Threads of an end: one can encrypt and send while another receives.
const THREADS: usize = 2;

/// Most time that the last bytes of a lane may take to arrive when the lane is gone already.
const LINGER: Duration = Duration::from_secs(2);

/// A peer from which nothing at all comes for so long, with bytes of a lane that is gone under way, is waited for no longer.
const SILENCE: Duration = Duration::from_secs(1);

/// Or for so many round trips, if those take longer.
const ROUND_TRIPS: u32 = 6;

/// Time to tell the peer that the connection is over. It is told at once; who does not hear it notices by itself, and
/// all lanes have ended before.
const GOODBYE: Duration = Duration::from_millis(50);

/// Says that all went as it should.
pub(crate) const IN_ORDER: VarInt = VarInt::from_u32(0);

/// Half of a stream, until it is seen off.
type Shared<T> = Arc<tokio::sync::Mutex<Option<T>>>;

/// The runtime and the endpoint.
#[derive(Debug)]
pub(crate) struct Host {
    endpoint: Endpoint,
    farewells: Mutex<JoinSet<()>>,
    threads: Option<Threads>,
}

/// What the endpoint runs on.
enum Threads {
    /// The runtime's own.
    Own(Runtime),
    /// One that the host has lent; it ends when it is told so.
    Lent { handle: Handle, end: oneshot::Sender<()>, joiner: Mutex<Box<dyn Joiner>> },
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Own(_)) { "Own" } else { "Lent" })
    }
}

impl Threads {
    fn start(spawner: Option<&dyn Spawner>) -> io::Result<Self> {
        let Some(spawner) = spawner else {
            let mut builder = Builder::new_multi_thread();
            return builder.worker_threads(THREADS).thread_name("ferry-quic").enable_all().build().map(Self::Own);
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (handle, (end, ended)) = (runtime.handle().clone(), oneshot::channel());
        let run = move || {
            // It comes to an error when nobody can say it any more.
            let _ = runtime.block_on(ended);
            runtime.shutdown_background();
        };
        let joiner = Mutex::new(spawner.spawn(ThreadRole::Transport("quic"), Box::new(run))?);
        Ok(Self::Lent { handle, end, joiner })
    }

    fn handle(&self) -> &Handle {
        match self {
            Self::Own(runtime) => runtime.handle(),
            Self::Lent { handle, .. } => handle,
        }
    }

    fn end(self) {
        match self {
            Self::Own(runtime) => runtime.shutdown_background(),
            Self::Lent { end, joiner, .. } => {
                let _ = end.send(());
                joiner.into_inner().unwrap_or_else(PoisonError::into_inner).join();
            }
        }
    }
}

impl Host {
    /// An end at this socket.
    pub(crate) fn start(
        socket: UdpSocket,
        server: Option<ServerConfig>,
        spawner: Option<&dyn Spawner>,
    ) -> Result<Arc<Self>, TransportError> {
        let refuse = |source: io::Error| TransportError::Option { option: "QUIC".to_owned(), source };
        let threads = Threads::start(spawner).map_err(refuse)?;
        let endpoint = {
            let _entered = threads.handle().enter();
            Endpoint::new(QuicOptions::endpoint(), server, socket, Arc::new(TokioRuntime)).map_err(refuse)?
        };
        Ok(Arc::new(Self { endpoint, farewells: Mutex::default(), threads: Some(threads) }))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn handle(&self) -> Option<&Handle> {
        self.threads.as_ref().map(Threads::handle)
    }

    /// Runs work that needs the runtime's clock or sockets, and waits for it.
    pub(crate) fn wait_for<T>(&self, time: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
        let _entered = self.handle().map(Handle::enter);
        wait_for(time, work)
    }

    /// Ends a lane as soon as its users let go of it: what was sent on it still arrives.
    pub(crate) fn see_off(&self, connection: Connection, send: Shared<SendStream>, receive: Shared<RecvStream>) {
        let Some(handle) = self.handle() else { return };
        let mut farewells = self.farewells.lock().unwrap_or_else(PoisonError::into_inner);
        while farewells.try_join_next().is_some() {}
        let farewell = async move {
            // Tells the peer that nobody reads any more.
            drop(receive.lock().await.take());
            let Some(mut send) = send.lock().await.take() else { return };
            if send.finish().is_ok() {
                // Whether it was received or the lane was broken: it is over.
                let arrived = async { drop(send.stopped().await) };
                tokio::select! {
                    () = arrived => {}
                    () = fall_silent(&connection) => {}
                    () = tokio::time::sleep(LINGER) => {}
                }
            }
        };
        farewells.spawn_on(farewell, handle);
    }
}

/// Waits until nothing has come for a while.
async fn fall_silent(connection: &Connection) {
    let heard = || connection.stats().udp_rx.datagrams;
    let mut before = heard();
    loop {
        // A peer that is far away answers late, and so does one behind a full queue.
        tokio::time::sleep(SILENCE.max(connection.rtt() * ROUND_TRIPS)).await;
        let now = heard();
        if std::mem::replace(&mut before, now) == now {
            return;
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut farewells = std::mem::take(self.farewells.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.wait_for(Some(LINGER), async { while farewells.join_next().await.is_some() {} });
        self.endpoint.close(IN_ORDER, b"");
        self.wait_for(Some(GOODBYE), self.endpoint.wait_idle());
        if let Some(threads) = self.threads.take() {
            threads.end();
        }
    }
}
