//! The line, watermarks, full passes, and how nodes sleep and are woken: two nodes of one slot each, or two, and
//! three producers with a job each.
//!
//! | step | stands for |
//! |---|---|
//! | `Insert`, `Publish` | a producer: the row draws its place, and the trigger `arrive` does as `wake`; commit |
//! | `Read`, `Claim` | `claim_lanes`: it reads the line and locks a row; commit |
//! | `Hear` | the dispatcher hears that a claim brought nothing, or all there was and less than it could take |
//! | `Stand`, `Answer` | `stand_sentry` on the listener's session; the dispatcher takes the post, or not |
//! | `Leave` | `leave_sentry` |
//! | `Notice`, `NoticeVacant` | a notification arrives |
//! | `Tick` | the dispatcher's `poll` |
//!
//! What is asked: a job that waits is claimed by a node with a free slot, though no other job ever ends and nobody
//! enqueues any more. Ticks are disabled, except where nodes are killed: a dead sentry tells nobody. Claims and
//! producers roll back at any time. A claim takes one job, so a full pass over more has several slices.
//!
//! Left out: priorities and dated jobs (lanes are read alike), cursors (see `cursors`), the reading again of the
//! last 100 ms (it only finds sooner what a full pass finds), the pauses after notifications in vain, and the second
//! look of guarded nodes: here all are deaf to what wakes the sentry.

mod functions;

use crate::explorer::{COMES_TO_REST, Protocol, breaks, holds, is_long};

const NODES: usize = 2;
const JOBS: usize = 3;

/// What is taken out of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Without {
    Nothing,
    /// Producers look whether a sentry sleeps, but take no shared lock: check, then sleep.
    SharedLock,
    /// The line is only read from the watermark on.
    FullPasses,
    /// Who takes the post sleeps at once.
    PassAfterTakingThePost,
    /// What a pass saw before a wake-up counts.
    WakeUpsDuringPasses,
    /// A full pass that met rows of another claim has seen all.
    LookingAgainAtLockedRows,
    /// A full pass that began before the post was taken, or before a wake-up, has seen all.
    StartingFullPassesAnew,
    /// An answer `guarded` is believed although a wake-up came before it.
    DoubtOfOldAnswers,
    /// The sentry leaves without telling the others.
    SentryNotice,
    /// Nobody looks until somebody tells him to.
    Tick,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct State {
    /// The rows that are there, by their places in the line. Only the order of places matters: when a row goes, the
    /// places behind it, and what is remembered of them, move up.
    line: [Option<Job>; JOBS],
    /// How many jobs will still be enqueued.
    unborn: u8,
    nodes: [Node; NODES],
    /// Which node's session holds the advisory lock exclusively.
    sentry: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Job {
    at: At,
    /// What its producer holds until the end of its transaction: the lock, shared, or a notification.
    holds: Option<Held>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum At {
    /// Its place is drawn, its producer has not committed.
    Inserted,
    /// Committed: in the line.
    Waiting,
    /// In the line, and locked by a claim in flight.
    Locked,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Held {
    SharedLock,
    Notification,
}

/// A dispatcher and its listener's session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Node {
    doing: Doing,
    /// How far it read the line.
    mark: usize,
    /// Where the next slice of its full pass begins.
    from: usize,
    standing: Option<Standing>,
    /// Woken while a call was on its way.
    woken: bool,
    /// No slice of this full pass found or met anything, and no wake-up came since it began.
    clean: bool,
    /// A full pass was clean from its start to its end: sleep well.
    seen_all: bool,
    /// `leave_sentry` is on its way.
    leaving: bool,
    /// Jobs that run.
    running: u8,
    /// Notifications that are on their way.
    wake: bool,
    vacant: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Doing {
    /// Is about to make a pass, now or after a pause of some ms.
    Awake,
    /// A claim holds a row; `alone`: it saw no other one, and read until there.
    Claiming { job: usize, full: bool, alone: Option<usize> },
    /// A claim read until there and left nothing; `met` a row that another claim holds; `found` one, and took it.
    Looked { until: usize, full: bool, met: bool, found: bool },
    /// The listener is asked for the post.
    Asking,
    /// Its answer is on its way.
    Asked(Standing),
    /// Until a notification or the tick.
    Asleep,
    /// The slots are taken.
    Busy,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Standing {
    Sentry,
    Guarded,
    /// Only producers hold the lock.
    Busy,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Insert,
    Publish(usize),
    /// The producer rolls back.
    Withdraw(usize),
    Read {
        node: usize,
        full: bool,
    },
    Claim(usize),
    /// A claim rolls back.
    Fail(usize),
    Hear(usize),
    Stand(usize),
    Answer(usize),
    Leave(usize),
    Notice(usize),
    /// A notification that the post is vacant.
    NoticeVacant(usize),
    /// The job ends: the slot is free.
    Finish(usize),
    /// The node is killed, with its session, and another one begins.
    Kill(usize),
    Tick(usize),
}

const WAITING: Option<Job> = Some(Job { at: At::Waiting, holds: None });

struct Wakeups {
    without: Without,
    /// Nodes are killed, and those that live look at each tick.
    kills: bool,
    jobs: u8,
    slots: u8,
}

const NEW: Node = Node {
    doing: Doing::Awake,
    mark: 0,
    from: 0,
    standing: None,
    woken: false,
    clean: false,
    seen_all: false,
    leaving: false,
    running: 0,
    wake: false,
    vacant: false,
};

impl Wakeups {
    fn has(&self, guard: Without) -> bool {
        self.without != guard
    }
}

impl Protocol for Wakeups {
    type State = State;
    type Step = Step;

    fn start(&self) -> State {
        State { line: [None; JOBS], unborn: self.jobs, nodes: [NEW; NODES], sentry: None }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Insert];
        for job in 0..usize::from(self.jobs) {
            steps.extend([Step::Publish(job), Step::Withdraw(job)]);
        }
        for node in 0..NODES {
            steps.extend([Step::Read { node, full: false }, Step::Claim(node), Step::Hear(node), Step::Stand(node)]);
            steps.extend([Step::Answer(node), Step::Leave(node), Step::Notice(node), Step::NoticeVacant(node)]);
            steps.extend([Step::Fail(node), Step::Finish(node)]);
            steps.extend(self.has(Without::FullPasses).then_some(Step::Read { node, full: true }));
            if self.kills {
                steps.push(Step::Kill(node));
                steps.extend(self.has(Without::Tick).then_some(Step::Tick(node)));
            }
        }
        steps
    }

    fn after(&self, mut s: State, step: Step) -> Option<State> {
        let from = |possible: bool| possible.then_some(());
        match step {
            Step::Insert => self.insert(&mut s)?,
            Step::Publish(job) | Step::Withdraw(job) => {
                let row = s.line[job].filter(|row| row.at == At::Inserted)?;
                if step == Step::Withdraw(job) {
                    Self::remove(&mut s, job);
                } else {
                    s.line[job] = WAITING;
                    s.nodes.iter_mut().for_each(|node| node.wake |= row.holds == Some(Held::Notification));
                }
            }
            Step::Read { node, full } => {
                from(s.nodes[node].doing == Doing::Awake)?;
                self.read(&mut s, node, full);
            }
            Step::Claim(n) | Step::Fail(n) => {
                let Doing::Claiming { job, full, alone } = s.nodes[n].doing else { return None };
                if step == Step::Claim(n) {
                    self.claim(&mut s, n, job, full, alone);
                } else {
                    s.line[job] = WAITING;
                    s.nodes[n].doing = Doing::Awake;
                }
            }
            Step::Hear(n) => {
                let Doing::Looked { until, full, met, found } = s.nodes[n].doing else { return None };
                self.hear(&mut s.nodes[n], until, full, met, found);
            }
            // Calls on a session follow each other.
            Step::Stand(n) => {
                from(s.nodes[n].doing == Doing::Asking && !s.nodes[n].leaving)?;
                s.nodes[n].doing = Doing::Asked(Self::stand(&mut s, n));
            }
            Step::Answer(n) => {
                let Doing::Asked(standing) = s.nodes[n].doing else { return None };
                self.answered(&mut s.nodes[n], standing);
            }
            Step::Leave(n) => {
                from(std::mem::take(&mut s.nodes[n].leaving))?;
                s.sentry = None;
                s.nodes.iter_mut().for_each(|node| node.vacant |= self.has(Without::SentryNotice));
            }
            Step::Notice(n) => {
                from(std::mem::take(&mut s.nodes[n].wake))?;
                // It is the sentry's. There was one, and if it leaves it says so later.
                if s.nodes[n].standing == Some(Standing::Sentry) {
                    self.woken(&mut s.nodes[n]);
                }
            }
            Step::NoticeVacant(n) => {
                from(std::mem::take(&mut s.nodes[n].vacant))?;
                Self::stand_down(&mut s.nodes[n]);
                self.woken(&mut s.nodes[n]);
            }
            Step::Finish(n) => {
                s.nodes[n].running = s.nodes[n].running.checked_sub(1)?;
                if s.nodes[n].doing == Doing::Busy {
                    s.nodes[n].doing = Doing::Awake;
                }
            }
            Step::Kill(n) => Self::kill(&mut s, n),
            Step::Tick(n) => {
                from(s.nodes[n].doing == Doing::Asleep)?;
                s.nodes[n].standing = s.nodes[n].standing.filter(|standing| *standing != Standing::Guarded);
                s.nodes[n].doing = Doing::Awake;
            }
        }
        self.tidy(&mut s);
        Some(s)
    }

    fn is_own(&self, _: &State, step: Step) -> bool {
        use Step::*;
        !matches!(step, Insert | Publish(_) | Withdraw(_) | Fail(_) | Finish(_) | Kill(_))
    }

    fn broken(&self, s: &State) -> Option<&'static str> {
        let guarded = |n: usize| s.nodes[n].standing == Some(Standing::Sentry) && s.sentry != Some(n);
        (0..NODES).any(guarded).then_some("who believes to be sentry is")
    }

    fn is_at_rest(&self, s: &State) -> bool {
        let waits = |job: &Job| job.at != At::Inserted;
        !s.line.iter().flatten().any(waits) || s.nodes.iter().all(|node| node.doing == Doing::Busy)
    }
}

/// Three jobs are one more than two nodes can run at once.
fn jobs() -> u8 {
    if is_long() { 3 } else { 2 }
}

const WHOLE: Wakeups = Wakeups { without: Without::Nothing, kills: false, jobs: 2, slots: 1 };

#[test]
fn a_job_that_waits_is_claimed_without_ticks() {
    holds("wake-ups", &Wakeups { jobs: jobs(), ..WHOLE }, 120_000);
}

#[test]
fn a_job_that_waits_is_claimed_though_nodes_are_killed() {
    holds("wake-ups with kills", &Wakeups { kills: true, jobs: jobs(), ..WHOLE }, 180_000);
}

#[test]
fn a_job_that_waits_is_claimed_though_the_sentry_works() {
    holds("wake-ups with two slots", &Wakeups { slots: 2, jobs: jobs(), ..WHOLE }, 80_000);
}

#[test]
fn without_a_guard_a_job_waits_for_ever() {
    use Without::*;
    let guards = [
        SharedLock,
        FullPasses,
        PassAfterTakingThePost,
        WakeUpsDuringPasses,
        LookingAgainAtLockedRows,
        StartingFullPassesAnew,
        DoubtOfOldAnswers,
        SentryNotice,
    ];
    for without in guards {
        breaks(&format!("without {without:?}"), &Wakeups { without, ..WHOLE }, COMES_TO_REST);
    }
    breaks("without Tick", &Wakeups { without: Tick, kills: true, ..WHOLE }, COMES_TO_REST);
}
