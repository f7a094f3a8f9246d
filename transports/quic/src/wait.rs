//! Waiting for something asynchronous on a thread of whatever kind: one of the host's own runtime as well.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

struct Sleeper {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Waits; `None` when the time is over first. Without a time, waits until it is done.
pub(crate) fn wait_for<T>(time: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    let end = time.and_then(|time| Instant::now().checked_add(time));
    let sleeper = Arc::new(Sleeper { thread: std::thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&sleeper));
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(done);
        }
        while !sleeper.woken.swap(false, Ordering::Acquire) {
            match end.map(|end| end.saturating_duration_since(Instant::now())) {
                None => std::thread::park(),
                Some(Duration::ZERO) => return None,
                Some(left) => std::thread::park_timeout(left),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_work_or_the_time() {
        let (tell, hear) = tokio::sync::oneshot::channel();
        let telling = std::thread::spawn(move || tell.send(7));
        assert_eq!(wait_for(None, hear), Some(Ok(7)));
        telling.join().unwrap().unwrap();
        assert_eq!(wait_for(Some(Duration::from_millis(5)), std::future::pending::<()>()), None);
        assert_eq!(wait_for(Some(Duration::ZERO), std::future::ready(3)), Some(3));
    }
}
