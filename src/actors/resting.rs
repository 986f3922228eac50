//! How far a dispatcher has read, what it waits for, and whether it may sleep: all that it remembers between messages.

use std::time::{Duration, Instant};

use actix::SpawnHandle;
use tokio::sync::oneshot;

use super::messages::Standing;
use crate::pacing::{FullPasses, Marks};
use crate::store::Mark;

/// Producers hold the post, or somebody a row: look again after this, doubling up to the second.
pub(super) const BUSY_POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// A sentry that so many times in a row finds jobs within this time of the last ones leaves its post: every
/// notification makes the commits of all who notify wait for each other.
const OFTEN: (u32, Duration) = (10, Duration::from_millis(5));
/// A guarded node that hears a notification looks after this time, or later if the sentry was faster, up to the tick:
/// the sentry's process may be stopped.
pub(super) const SECOND_LOOK: Duration = Duration::from_millis(50);

/// See the module.
pub(crate) struct Resting {
    pub(super) marks: Marks<Vec<Mark>>,
    pub(super) passes: FullPasses<Vec<Mark>>,
    pub(super) doing: Doing,
    /// Woken while passing.
    pub(super) woken: bool,
    /// The notification that began this pass brought nothing so far.
    pub(super) notified: bool,
    pub(super) vain: u32,
    pub(super) standing: Option<Standing>,
    /// A whole full pass left nothing behind since the post was taken and since the last wake-up: sleep well.
    pub(super) seen_all: bool,
    pub(super) busy_poll: Duration,
    /// When a pass last brought jobs, and how often that was soon after the one before.
    found: Instant,
    in_a_row: u32,
    pub(super) second_look: Duration,
    /// The timer is set for a second look.
    pub(super) looking: bool,
    pub(super) timer: Option<SpawnHandle>,
    pub(super) drained: Option<oneshot::Sender<()>>,
    pub(super) draining: bool,
}

impl Default for Resting {
    fn default() -> Self {
        Resting {
            marks: Marks::new(Instant::now()),
            passes: FullPasses::new(Instant::now()),
            doing: Doing::Nothing,
            woken: false,
            notified: false,
            vain: 0,
            standing: None,
            seen_all: false,
            busy_poll: BUSY_POLL.0,
            found: Instant::now(),
            in_a_row: 0,
            second_look: SECOND_LOOK,
            looking: false,
            timer: None,
            drained: None,
            draining: false,
        }
    }
}

impl Resting {
    /// A pass brought jobs. Answers whether they keep coming.
    pub(super) fn found(&mut self, now: Instant) -> bool {
        let soon = now - std::mem::replace(&mut self.found, now) < OFTEN.1;
        self.in_a_row = if soon { self.in_a_row + 1 } else { 0 };
        self.in_a_row >= OFTEN.0
    }
}

/// What is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Doing {
    /// A claim is on its way.
    Passing,
    /// The listener is asked for the post.
    Asking,
    /// Waits for a timer or a wake-up.
    Nothing,
}
