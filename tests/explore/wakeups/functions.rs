//! What producers, the functions of the protocol, and the dispatcher do to a state.

use super::{At, Doing, Held, JOBS, Job, NEW, Node, Standing, State, WAITING, Wakeups, Without};

impl Wakeups {
    /// An INSERT: the row draws its place, the statement's trigger calls `wake`.
    pub fn insert(&self, s: &mut State) -> Option<()> {
        s.unborn = s.unborn.checked_sub(1)?;
        let holds = match s.sentry {
            Some(_) => Some(Held::Notification),
            None => Some(Held::SharedLock).filter(|_| self.has(Without::SharedLock)),
        };
        *s.line.iter_mut().find(|place| place.is_none())? = Some(Job { at: At::Inserted, holds });
        Some(())
    }

    /// A row goes: claimed, or rolled back by its producer.
    pub fn remove(s: &mut State, job: usize) {
        s.line[job..].rotate_left(1);
        s.line[JOBS - 1] = None;
        let up = |pos: &mut usize| *pos -= usize::from(*pos > job);
        for node in &mut s.nodes {
            up(&mut node.mark);
            up(&mut node.from);
            match &mut node.doing {
                Doing::Claiming { job, alone, .. } => {
                    up(job);
                    alone.iter_mut().for_each(up);
                }
                Doing::Looked { until, .. } => up(until),
                _ => {}
            }
        }
    }

    /// The first half of `claim_lanes`: read the line, lock the first row.
    pub fn read(&self, s: &mut State, n: usize, full: bool) {
        let node = &mut s.nodes[n];
        node.clean |= full && node.from == 0;
        let from = if full { node.from } else { node.mark };
        let visible = |job: &usize| s.line[*job].is_some_and(|job| job.at != At::Inserted);
        node.doing = match (from..JOBS).find(visible) {
            None => Doing::Looked { until: s.line.iter().flatten().count(), full, met: false, found: false },
            Some(job) if s.line[job].is_some_and(|job| job.at == At::Locked) => {
                Doing::Looked { until: job + 1, full, met: true, found: false }
            }
            Some(job) => {
                let alone = !(job + 1..JOBS).any(|other| visible(&other));
                let alone = alone.then(|| s.line.iter().flatten().count());
                s.line[job] = Some(Job { at: At::Locked, holds: None });
                Doing::Claiming { job, full, alone }
            }
        };
    }

    /// Remember how far a pass read. True if nothing stands behind.
    pub fn remember(node: &mut Node, until: usize, full: bool) -> bool {
        let ended = until >= node.mark;
        if full {
            node.from = if ended { 0 } else { until };
        }
        if !full || ended {
            node.mark = until;
        }
        ended
    }

    /// The claim commits: its job runs. Who has as much as he can take is no sentry.
    pub fn claim(&self, s: &mut State, n: usize, job: usize, full: bool, alone: Option<usize>) {
        let node = &mut s.nodes[n];
        node.running += 1;
        if node.running == self.slots {
            Self::stand_down(node);
        }
        match alone {
            Some(until) if node.running < self.slots => {
                node.doing = Doing::Looked { until, full, met: false, found: true };
            }
            _ => {
                Self::remember(node, job + 1, full);
                node.clean = false;
                node.doing = if node.running < self.slots { Doing::Awake } else { Doing::Busy };
            }
        }
        Self::remove(s, job);
    }

    pub fn stand_down(node: &mut Node) {
        node.leaving |= node.standing == Some(Standing::Sentry);
        node.standing = None;
    }

    /// A pass left nothing: sleep if a full pass saw all since the post was taken, else look again or ask.
    pub fn hear(&self, node: &mut Node, until: usize, full: bool, met: bool, found: bool) {
        let ended = Self::remember(node, until, full);
        if full {
            node.clean &= !met || !self.has(Without::LookingAgainAtLockedRows);
            node.clean |= !self.has(Without::StartingFullPassesAnew) && !met && !node.woken;
            node.seen_all = ended && node.clean;
        }
        let full_passes = self.has(Without::FullPasses);
        node.doing = match node.standing {
            _ if node.woken || met => Doing::Awake,
            standing if found && !(full && standing.is_some() && node.seen_all) => Doing::Awake,
            Some(_) if node.seen_all || !full_passes => Doing::Asleep,
            Some(_) => Doing::Awake,
            None => Doing::Asking,
        };
    }

    /// `stand_sentry`: try the lock exclusively.
    pub fn stand(s: &mut State, n: usize) -> Standing {
        assert_ne!(s.sentry, Some(n), "nobody asks for a post that he holds");
        match s.sentry {
            Some(_) => Standing::Guarded,
            None if s.line.iter().flatten().any(|job| job.holds == Some(Held::SharedLock)) => Standing::Busy,
            None => {
                s.sentry = Some(n);
                Standing::Sentry
            }
        }
    }

    pub fn answered(&self, node: &mut Node, standing: Standing) {
        node.doing = Doing::Awake;
        let old = node.woken && self.has(Without::DoubtOfOldAnswers);
        if standing == Standing::Busy || standing == Standing::Guarded && old {
            return;
        }
        node.standing = Some(standing);
        node.clean = false;
        node.seen_all = false;
        if !self.has(Without::PassAfterTakingThePost) {
            node.doing = Doing::Asleep;
        }
    }

    /// Somebody says that there may be work.
    pub fn woken(&self, node: &mut Node) {
        match node.doing {
            Doing::Busy => {}
            Doing::Asleep | Doing::Awake => node.doing = Doing::Awake,
            _ => node.woken = self.has(Without::WakeUpsDuringPasses),
        }
        if node.woken || matches!(node.doing, Doing::Awake) {
            node.clean = false;
            node.seen_all = false;
        }
    }

    /// Forget what nobody will look at, so that states that differ in nothing else are one.
    pub fn tidy(&self, s: &mut State) {
        for node in &mut s.nodes {
            if matches!(node.doing, Doing::Awake | Doing::Asleep | Doing::Busy) {
                node.woken = false;
                node.clean &= node.from > 0; // it is set when a full pass begins
            }
            node.seen_all &= node.standing.is_some();
            if node.doing == Doing::Busy {
                // What it hears now, it will not need to know; its marks are those of nobody.
                (node.wake, node.vacant) = (false, false);
            }
        }
        // Nodes are alike.
        if s.nodes[1] < s.nodes[0] {
            s.nodes.swap(0, 1);
            s.sentry = s.sentry.map(|sentry| 1 - sentry);
        }
    }

    /// The session ends: its lock, its claim in flight, and what it was told are gone.
    pub fn kill(s: &mut State, n: usize) {
        if let Doing::Claiming { job, .. } = s.nodes[n].doing {
            s.line[job] = WAITING;
        }
        s.sentry = s.sentry.filter(|sentry| *sentry != n);
        s.nodes[n] = NEW;
    }
}
