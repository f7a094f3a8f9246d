//! The runtime and the endpoint of one end. They live as long as the end or any of its lanes, and a little longer if what
//! was said last is still on its way.

use std::io;
use std::net::UdpSocket;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageferry::transport::TransportError;
use quinn::{Endpoint, RecvStream, SendStream, ServerConfig, TokioRuntime, VarInt};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinSet;

use crate::options::QuicOptions;
use crate::wait::wait_for;

/// Threads of an end: one can encrypt and send while another receives.
const THREADS: usize = 2;

/// Most time that the last bytes of a lane may take to arrive when the lane is gone already.
const LINGER: Duration = Duration::from_secs(2);

/// Most time to tell the peer that the connection is over.
const GOODBYE: Duration = Duration::from_millis(200);

/// Says that all went as it should.
pub(crate) const IN_ORDER: VarInt = VarInt::from_u32(0);

/// Half of a stream, until it is seen off.
type Shared<T> = Arc<tokio::sync::Mutex<Option<T>>>;

/// The runtime and the endpoint.
#[derive(Debug)]
pub(crate) struct Host {
    endpoint: Endpoint,
    farewells: Mutex<JoinSet<()>>,
    runtime: Option<Runtime>,
}

impl Host {
    /// An end at this socket.
    pub(crate) fn start(socket: UdpSocket, server: Option<ServerConfig>) -> Result<Arc<Self>, TransportError> {
        let refuse = |source: io::Error| TransportError::Option { option: "QUIC".to_owned(), source };
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(THREADS).thread_name("pageferry-quic").enable_all().build();
        let runtime = runtime.map_err(refuse)?;
        let endpoint = {
            let _entered = runtime.enter();
            Endpoint::new(QuicOptions::endpoint(), server, socket, Arc::new(TokioRuntime)).map_err(refuse)?
        };
        Ok(Arc::new(Self { endpoint, farewells: Mutex::default(), runtime: Some(runtime) }))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn handle(&self) -> Option<&Handle> {
        self.runtime.as_ref().map(Runtime::handle)
    }

    /// Runs work that needs the runtime's clock or sockets, and waits for it.
    pub(crate) fn wait_for<T>(&self, time: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
        let _entered = self.handle().map(Handle::enter);
        wait_for(time, work)
    }

    /// Ends a lane as soon as its users let go of it: what was sent on it still arrives.
    pub(crate) fn see_off(&self, send: Shared<SendStream>, receive: Shared<RecvStream>) {
        let Some(handle) = self.handle() else { return };
        let mut farewells = self.farewells.lock().unwrap_or_else(PoisonError::into_inner);
        while farewells.try_join_next().is_some() {}
        let farewell = async move {
            // Tells the peer that nobody reads any more.
            drop(receive.lock().await.take());
            let Some(mut send) = send.lock().await.take() else { return };
            if send.finish().is_ok() {
                // Whether it was received or the lane was broken: it is over.
                let _ = tokio::time::timeout(LINGER, send.stopped()).await;
            }
        };
        farewells.spawn_on(farewell, handle);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut farewells = std::mem::take(self.farewells.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.wait_for(Some(LINGER), async { while farewells.join_next().await.is_some() {} });
        self.endpoint.close(IN_ORDER, b"");
        self.wait_for(Some(GOODBYE), self.endpoint.wait_idle());
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
