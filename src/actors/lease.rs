//! The node's lease, as its actors see it. The [keeper](super::keeper) begins, keeps and ends it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The lease that claims are made for, and the claims that are open. Shared by the actors of a node.
#[derive(Clone, Default)]
pub(crate) struct Lease(Arc<Held>);

#[derive(Default)]
struct Held {
    /// 0: none.
    id: AtomicI64,
    /// Until when it may be relied on, in nanoseconds since boot.
    until: AtomicU64,
    /// Somebody was told that the lease has ended.
    doubted: AtomicBool,
    /// How many jobs of each claim are not settled yet.
    open: Mutex<HashMap<i64, usize>>,
}

/// A random number that was never used before: a lease, or a claim's token.
pub(crate) fn draw() -> i64 {
    loop {
        match rand::random() {
            0 => continue,
            token => return token,
        }
    }
}

/// Time since boot, counting time in suspend, which [`std::time::Instant`] does not on Linux.
pub(crate) fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

impl Lease {
    /// The living lease.
    pub(crate) fn id(&self) -> Option<i64> {
        Some(self.0.id.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// The database has confirmed it, for `ttl` from when it was asked at the earliest. It is relied on for
    /// two thirds of that, so that work has stopped before the reaper acts.
    pub(crate) fn confirmed(&self, asked: Duration, ttl: Duration) {
        self.0.until.store((asked + ttl * 2 / 3).as_nanos() as u64, Ordering::Release);
    }

    /// True if it may not be relied on any more: the process was stopped, or the database silent, for too long.
    pub(crate) fn is_overdue(&self) -> bool {
        since_boot().as_nanos() as u64 > self.0.until.load(Ordering::Acquire)
    }

    /// True if jobs of this claim may start: it was made under this lease and not an earlier one, and the lease
    /// may be relied on.
    pub(crate) fn covers(&self, token: i64) -> bool {
        !self.is_overdue() && self.open().contains_key(&token)
    }

    /// The database refused the lease: the keeper finds out at once.
    pub(crate) fn doubt(&self) {
        self.0.doubted.store(true, Ordering::Release);
    }

    /// A claim is about to be made; until it is settled or failed, the heartbeat knows it.
    pub(crate) fn opens(&self, token: i64) {
        self.open().insert(token, usize::MAX);
    }

    /// A claim brought this many jobs.
    pub(crate) fn opened(&self, token: i64, jobs: usize) {
        match jobs {
            0 => self.open().remove(&token),
            _ => self.open().insert(token, jobs),
        };
    }

    /// A job of a claim is settled.
    pub(crate) fn settled(&self, token: i64) {
        let mut open = self.open();
        if let Some(jobs) = open.get_mut(&token) {
            *jobs -= 1;
            if *jobs == 0 {
                open.remove(&token);
            }
        }
    }

    /// A lease began.
    pub(crate) fn begun(&self, id: i64) {
        self.0.id.store(id, Ordering::Release);
    }

    /// It is lost, and with it every claim. Returns which one it was.
    pub(crate) fn lost(&self) -> i64 {
        let id = self.0.id.swap(0, Ordering::AcqRel);
        self.open().clear();
        id
    }

    /// True once after a doubt.
    pub(crate) fn is_doubted(&self) -> bool {
        self.0.doubted.swap(false, Ordering::AcqRel)
    }

    /// How many claims are open.
    pub(crate) fn open_claims(&self) -> usize {
        self.open().len()
    }

    /// Those of these tokens that no actor of this node knows.
    pub(crate) fn unknown(&self, tokens: Vec<i64>) -> Vec<i64> {
        let open = self.open();
        tokens.into_iter().filter(|token| !open.contains_key(token)).collect()
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<i64, usize>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
