//! How much to claim, and when to read the line from its start. Decides only; the Dispatcher acts.

use std::time::{Duration, Instant};

/// Claimed jobs wait in memory at most about this long before a slot is free for them.
const PREFETCH_HORIZON: Duration = Duration::from_millis(100);
/// At most so many claimed jobs wait in memory.
pub const MAX_PREFETCH: usize = 2000;
/// While so many jobs have ended and are not settled, none is claimed: a database that settles slowly must not fill
/// the node's memory, nor lose much work with the node.
pub const MAX_UNSETTLED: usize = 4000;
/// At most so many jobs are claimed in one call.
pub const MAX_CLAIM: usize = 1000;
/// A full pass is due after this time, if full passes are cheap.
const FULL_PASS_EVERY: Duration = Duration::from_millis(250);
/// Between two full passes lies at least this multiple of the last one's duration.
const FULL_PASS_SHARE: u32 = 20;

/// How many jobs to claim for `slots` slots, of which `busy` run, with `waiting` jobs claimed already
/// and a mean run of `mean_run`: what the free slots can start, and as many more as the slots will
/// finish within 100 ms. None as long as half of that is at hand: claims are cheap in bulk; and none while too
/// many, `unsettled`, wait for their settle.
pub fn demand(slots: usize, busy: usize, waiting: usize, unsettled: usize, mean_run: Duration) -> usize {
    let prefetch = slots.saturating_mul(runs_ahead(mean_run)).min(MAX_PREFETCH);
    let target = slots.saturating_sub(busy) + prefetch;
    if waiting * 2 > target || unsettled >= MAX_UNSETTLED { 0 } else { (target - waiting).min(MAX_CLAIM) }
}

/// How many jobs of one cursor to take at once: what a slot finishes within 100 ms, at least one.
pub fn run_length(mean_run: Duration, max: usize) -> usize {
    runs_ahead(mean_run).clamp(1, max)
}

fn runs_ahead(mean_run: Duration) -> usize {
    (PREFETCH_HORIZON.as_nanos() / mean_run.as_nanos().max(1)).min(MAX_PREFETCH as u128) as usize
}

/// Near the end of the line, claims read again what was drawn within this time.
const TAIL: Duration = Duration::from_millis(100);
/// Between two such claims lies at least this multiple of the last one's reading: while a snapshot is held they read
/// all that is gone since, too.
const TAIL_SHARE: u32 = 8;

/// Where claims go on reading. As long as there is plenty, from the last row that was read. At the end
/// of the line, unless that is expensive, from where the reading stood a moment ago: of the rows that arrive there, some
/// commit later than their neighbours, and lie behind the mark.
#[derive(Debug)]
pub struct Marks<M> {
    last: M,
    recent: M,
    older: M,
    turned: Instant,
    at_end: bool,
    /// When the last moment may be read again, and whether it is being read.
    tail_due: Instant,
    tail: bool,
}

impl<M: Clone + Default> Marks<M> {
    /// Nothing was read yet.
    pub fn new(now: Instant) -> Self {
        let (last, recent, older) = (M::default(), M::default(), M::default());
        Marks { last, recent, older, turned: now, at_end: false, tail_due: now, tail: false }
    }

    /// True if the last claim read to the end of the line: nobody waits behind.
    pub fn at_end(&self) -> bool {
        self.at_end
    }

    /// How far claims have read.
    pub fn last(&self) -> &M {
        &self.last
    }

    /// Where the next claim reads on.
    pub fn next(&mut self, now: Instant) -> M {
        self.tail = self.at_end && now >= self.tail_due;
        if self.tail { self.older.clone() } else { self.last.clone() }
    }

    /// A claim read until there, and so long; to the end of the line or not.
    pub fn read(&mut self, now: Instant, until: M, at_end: bool, took: Duration) {
        if std::mem::take(&mut self.tail) {
            self.tail_due = now + took * TAIL_SHARE;
        }
        self.last = until;
        self.at_end = at_end;
        if now - self.turned >= TAIL {
            self.turned = now;
            self.older = std::mem::replace(&mut self.recent, self.last.clone());
        }
    }
}

/// When a claim reads the line from its start. Watermarks skip what became claimable behind them (a
/// late commit, a claim that rolled back, a row that was locked); such a full pass finds it. It is made
/// in slices: one claim each, going on where the last one ended.
#[derive(Debug)]
pub struct FullPasses<M> {
    due: Instant,
    ended: Instant,
    from: M,
    clean: bool,
}

impl<M: Clone + Default + PartialEq> FullPasses<M> {
    /// The first full pass is due at once.
    pub fn new(now: Instant) -> Self {
        FullPasses { due: now, ended: now, from: M::default(), clean: false }
    }

    /// A slice begins there.
    pub fn begin(&mut self) -> M {
        self.clean |= self.from == M::default();
        self.from.clone()
    }

    /// A slice ended there; the next pass begins at the start if this one came to its end. Clean: it found
    /// nothing, and met nothing that somebody holds. True if the whole pass was clean and undisturbed: the
    /// line is empty.
    pub fn sliced(&mut self, until: M, ended: bool, clean: bool) -> bool {
        self.clean &= clean;
        self.from = if ended { M::default() } else { until };
        ended && self.clean
    }

    /// Something may have come to where this pass has been.
    pub fn disturb(&mut self) {
        self.clean = false;
    }

    /// True if the next claim must be a slice of a full pass.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.due
    }

    /// A slice took this long.
    pub fn made(&mut self, now: Instant, took: Duration) {
        self.ended = now;
        self.due = now + (took * FULL_PASS_SHARE).max(FULL_PASS_EVERY);
    }

    /// Make a full pass due at once, if they are cheap.
    pub fn hurry(&mut self, now: Instant) {
        if self.due <= self.ended + FULL_PASS_EVERY {
            self.due = now;
        }
    }

    /// How long until the next full pass.
    pub fn due_in(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_jobs_are_not_prefetched_and_short_ones_are() {
        assert_eq!(demand(16, 16, 0, 0, Duration::from_secs(1)), 0);
        assert_eq!(demand(16, 10, 0, 0, Duration::from_secs(1)), 6);
        assert_eq!(demand(16, 16, 0, 0, Duration::from_millis(10)), 160);
        assert_eq!(demand(16, 0, 1500, 0, Duration::from_micros(5)), 0, "more than half is at hand");
        assert_eq!(demand(16, 0, 900, 0, Duration::from_micros(5)), 1000);
        assert_eq!(demand(16, 0, 0, MAX_UNSETTLED, Duration::from_micros(5)), 0, "settles are behind");
        assert_eq!(run_length(Duration::from_millis(30), 50), 3);
        assert_eq!(run_length(Duration::from_secs(30), 50), 1);
    }

    proptest! {
        #[test]
        fn never_more_than_slots_and_prefetch(slots in 0usize..2000, busy in 0usize..3000, waiting in 0usize..4000, unsettled in 0usize..9000, us in 0u64..10_000_000) {
            let n = demand(slots, busy, waiting, unsettled, Duration::from_micros(us));
            prop_assert!(n <= MAX_CLAIM);
            prop_assert!(n + waiting <= slots + MAX_PREFETCH || n == 0);
            prop_assert!(n == 0 || unsettled < MAX_UNSETTLED);
        }
    }

    #[test]
    fn at_the_end_of_the_line_the_last_moment_is_read_again_as_long_as_that_is_cheap() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let took = Duration::from_millis;
        let mut marks = Marks::<u64>::new(start);
        marks.read(at(1), 10, false, took(0));
        assert_eq!(marks.next(at(1)), 10, "plenty: on from the last row");
        marks.read(at(2), 20, true, took(0));
        assert_eq!(marks.next(at(2)), 0, "the end: from a moment ago");
        marks.read(at(110), 30, true, took(0));
        marks.read(at(150), 40, true, took(0));
        assert_eq!(marks.next(at(151)), 0, "30 was reached only 40 ms ago");
        marks.read(at(220), 50, true, took(1));
        assert_eq!(marks.next(at(221)), 50, "not so soon again");
        marks.read(at(222), 55, true, took(9));
        assert_eq!(marks.next(at(228)), 30, "more than 100 ms ago, and the last such reading was short");
        marks.read(at(229), 60, false, took(0));
        assert_eq!(marks.next(at(229)), 60);
    }

    #[test]
    fn only_a_whole_clean_pass_has_seen_all() {
        let mut passes = FullPasses::<u64>::new(Instant::now());
        let mut slice = |from, until, ended, clean, disturbed: bool| {
            assert_eq!(passes.begin(), from);
            if disturbed {
                passes.disturb();
            }
            passes.sliced(until, ended, clean)
        };
        assert!(slice(0, 9, true, true, false));
        assert!(!slice(0, 9, true, true, true), "a wake-up came after it began");
        assert!(!slice(0, 5, false, false, false), "its first slice met a row that is locked");
        assert!(!slice(5, 9, true, true, false), "and the second one does not see that row");
        assert!(slice(0, 9, true, true, false));
    }

    #[test]
    fn full_passes_take_a_twentieth_of_the_time() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut passes = FullPasses::<()>::new(start);
        assert!(passes.is_due(start));
        passes.made(start, ms(100));
        assert!(!passes.is_due(start + ms(1999)));
        passes.hurry(start + ms(10));
        assert!(!passes.is_due(start + ms(10)), "expensive passes are not hurried");
        assert!(passes.is_due(start + ms(2000)));
        passes.made(start + ms(2000), ms(1));
        assert!(!passes.is_due(start + ms(2249)));
        passes.hurry(start + ms(2001));
        assert!(passes.is_due(start + ms(2001)), "cheap passes are");
    }
}
