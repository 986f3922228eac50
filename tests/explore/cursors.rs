//! Leases, claims, tokens, cursors: two nodes that are killed, fall silent and lose answers, and three jobs.
//!
//! | step | stands for |
//! |---|---|
//! | `Insert` | a producer's commit |
//! | `BeginLease`, `Extend` | `begin_lease`, by a node that has no lease or gave it up; a heartbeat, `extend` |
//! | `LockLease`, `Claim`, `ClaimNothing` | `claim_lanes`: it locks its lease FOR KEY SHARE; it takes a run; commit |
//! | `Settle`, `SettleLate` | `settle`: `let_go`, `finish`, `put_back`, `pass_on` |
//! | `Park` | `park`, of a claim that meets a job of a busy cursor |
//! | `GiveBack` | `give_back` of an open claim that a heartbeat named and the node does not know |
//! | `LockDead`, `Reap` | `reap`: it locks an expired lease FOR UPDATE, marks it dead; `give_back` of its claims; commit |
//! | `Promote` | `promote`, of a job whose delay is over |
//!
//! Nobody is ever waited for, so each node is a ghost at any moment: it sleeps while its lease is reaped, and
//! settles later. A call whose connection breaks lives on in the server as an *orphan*: it commits at any time, or
//! never, and nobody hears the answer. A node that is killed begins again, with nothing.
//!
//! Any two faults strike (three in the long form): a node is killed, or loses a call, or falls silent for the time
//! of a lease; a job retries; a reaper finds jobs locked. A token or lease is new if nobody remembers it.
//!
//! Left out: suspects, losses and attempts with their limits; cancelling and operators; places in the line and how it
//! is read (see `wakeups`); marks of mailboxes. A claim takes one run, and a node has one run at a time.

mod functions;
mod state;

use self::state::{Call, Claim, Cursor, Job, Lease, NEW, State, fold};
use crate::explorer::{COMES_TO_REST, Protocol, breaks, holds, is_long};

const NODES: usize = 2;
const JOBS: usize = 3;
const KEYS: usize = 2;
/// Nobody remembers more tokens, or leases, at one time.
const NAMES: usize = 6;

const ONE_OWNER: &str = "one owner: running jobs of a cursor have its owner's token";
const LEASED: &str = "a running job has a claim, and the claim has a lease";
const HEADS: &str = "the head of a free cursor is in the line";
const VERSIONS: &str = "versions are 1..n without gap or fork, and n is the cursor's";
const STATE: &str = "the state is the fold of the finished jobs";
const ORDER: &str = "jobs of a cursor finish in order";
const STALE: &str = "no settle of a claim that is over is accepted";

/// What is taken out of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Without {
    Nothing,
    /// Jobs are settled by id alone.
    TokenOfJobs,
    /// A cursor's state is written whoever owns it, and whatever its version.
    OwnerAndVersion,
    /// A cursor's state is written whoever owns it.
    Owner,
    /// A cursor's state is written whatever its version.
    Version,
    /// A settle lets go of the cursor, and leaves its state to a second transaction.
    StateBeforeLettingGo,
    /// A claim looks at its lease, but does not lock it.
    LeaseLock,
    /// A claim does not look whether the cursor is owned, and reads past its running jobs.
    OwnersInClaims,
    /// Who lets go of a cursor leaves its next job parked.
    PassingOn,
    /// A job that retries lets others pass.
    Hold,
    /// A node draws the same token each time.
    NewTokens,
    /// A lease that was reaped in part may be extended.
    DeadMark,
    /// Heartbeats do not ask for claims that the node does not know.
    GivingBack,
}

/// Who made a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Caller {
    Node(usize),
    Orphan,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Insert,
    LockLease(Caller),
    /// Take this job, or a run of the cursor that it belongs to, of so many jobs.
    Claim(Caller, usize, u8),
    /// Nothing can be claimed.
    ClaimNothing(Caller),
    /// The first jobs of the run completed; if there are more, the next one retries and the rest goes back.
    Settle(usize, u8),
    SettleLate,
    Park(usize),
    Extend(usize),
    GiveBack(usize, u8),
    LockDead(u8),
    /// `stuck`: the jobs of one claim are locked by somebody else, and stay claimed until a later pass.
    Reap {
        stuck: bool,
    },
    Promote(usize),
    BeginLease(usize),
    /// A claim's connection breaks, before or after it has locked its lease.
    LoseClaim(usize),
    /// A settle's connection breaks before it is made. The node will settle again.
    LoseSettle(usize, u8),
    /// The orphan's transaction never commits.
    Abort,
    Kill(usize),
    /// No heartbeat came in time.
    Expire(u8),
}

struct Cursors {
    /// Which cursor each job belongs to.
    keys: [Option<usize>; JOBS],
    without: Without,
    /// How many strike at most.
    faults: u8,
}

impl Cursors {
    fn has(&self, guard: Without) -> bool {
        self.without != guard
    }

    fn jobs_of(&self, key: usize) -> impl Iterator<Item = usize> + '_ {
        (0..JOBS).filter(move |job| self.keys[*job] == Some(key))
    }

    fn is_fault(&self, s: &State, step: Step) -> bool {
        match step {
            // A node that lives keeps its lease.
            Step::Expire(lease) => s.nodes.iter().any(|node| node.lease == Some(lease)),
            Step::Settle(n, completed) => s.nodes[n].run.is_some_and(|run| run.jobs.count_ones() > completed.into()),
            Step::LoseClaim(_) | Step::LoseSettle(..) | Step::Kill(_) | Step::Reap { stuck: true } => true,
            _ => false,
        }
    }
}

const CALLERS: [Caller; 3] = [Caller::Node(0), Caller::Node(1), Caller::Orphan];

impl Protocol for Cursors {
    type State = State;
    type Step = Step;

    fn start(&self) -> State {
        let late = self.jobs_of(0).nth(1); // it arrives while its cursor may be busy
        State {
            jobs: std::array::from_fn(|job| if Some(job) == late { Job::Unborn } else { Job::InLine }),
            cursors: [Cursor { owner: None, version: 0, state: 0, hold: None }; KEYS],
            claims: [None; NAMES],
            leases: [None; NAMES],
            reaping: None,
            nodes: [NEW; NODES],
            orphan: None,
            faults: self.faults,
            stale: false,
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Insert, Step::SettleLate, Step::Abort];
        steps.extend([Step::Reap { stuck: false }, Step::Reap { stuck: true }]);
        for caller in CALLERS {
            steps.extend([Step::LockLease(caller), Step::ClaimNothing(caller)]);
            steps.extend((0..JOBS).map(|job| Step::Claim(caller, job, 1)));
            let of_cursor = |job: &usize| self.keys[*job].is_some_and(|key| self.jobs_of(key).count() > 1);
            steps.extend((0..JOBS).filter(of_cursor).map(|job| Step::Claim(caller, job, 2)));
        }
        for n in 0..NODES {
            steps.extend([Step::Extend(n), Step::BeginLease(n), Step::LoseClaim(n), Step::Kill(n)]);
            steps.extend((0..=2).flat_map(|completed| [Step::Settle(n, completed), Step::LoseSettle(n, completed)]));
            steps.extend((0..NAMES as u8).map(|token| Step::GiveBack(n, token)));
        }
        steps.extend((0..JOBS).flat_map(|job| [Step::Park(job), Step::Promote(job)]));
        steps.extend((0..NAMES as u8).flat_map(|lease| [Step::LockDead(lease), Step::Expire(lease)]));
        steps
    }

    fn after(&self, mut s: State, step: Step) -> Option<State> {
        let only = |possible: bool| possible.then_some(());
        s.faults = s.faults.checked_sub(self.is_fault(&s, step).into())?;
        match step {
            Step::Insert => {
                let next = s.jobs.iter_mut().find(|job| **job == Job::Unborn)?;
                *next = Job::InLine;
            }
            Step::BeginLease(n) => {
                only(s.nodes[n].lease.is_none_or(|lease| s.leases[lease as usize] != Some(Lease::Lives)))?;
                let lease = self.new_names(&s).1;
                s.nodes[n].lease = Some(lease);
                s.leases[lease as usize] = Some(Lease::Lives);
            }
            Step::LockLease(Caller::Node(n)) => {
                let claiming = self.call_claim(&s, n)?;
                s.nodes[n].claiming = self.lock_lease(&s, claiming)?;
            }
            Step::LockLease(Caller::Orphan) => {
                let claiming = Self::claiming(&s, Caller::Orphan).filter(|claiming| !claiming.locked)?;
                s.orphan = self.lock_lease(&s, claiming)?.map(Call::Claim);
            }
            Step::Claim(caller, job, length) => {
                let claiming = Self::claiming(&s, caller).filter(|claiming| claiming.locked)?;
                let run = self.claim(&mut s, claiming, job, length)?;
                Self::answer(&mut s, caller, Some(run));
            }
            Step::ClaimNothing(caller) => {
                let claiming = Self::claiming(&s, caller).filter(|claiming| claiming.locked)?;
                only((0..JOBS).all(|job| self.claim(&mut s.clone(), claiming, job, 1).is_none()))?;
                Self::answer(&mut s, caller, None);
            }
            Step::Settle(n, completed) => {
                let run = s.nodes[n].run.filter(|run| run.jobs.count_ones() >= completed.into())?;
                s.nodes[n].run = None;
                self.settle(&mut s, &run, completed);
            }
            Step::LoseSettle(n, completed) => {
                let run = s.nodes[n].run.filter(|run| run.jobs.count_ones() >= completed.into())?;
                only(s.orphan.is_none())?;
                s.orphan = Some(Call::Settle { run, completed });
            }
            Step::SettleLate => {
                let Some(Call::Settle { run, completed }) = s.orphan else { return None };
                s.orphan = None;
                self.settle(&mut s, &run, completed);
            }
            Step::LoseClaim(n) => {
                only(s.orphan.is_none())?;
                let called = self.call_claim(&s, n);
                s.orphan = Some(Call::Claim(s.nodes[n].claiming.take().or(called)?));
            }
            Step::Park(job) => {
                let key = self.keys[job]?;
                only(s.jobs[job] == Job::InLine)?;
                only(s.cursors[key].owner.is_some() || self.head(&s, key) != Some(job))?;
                s.jobs[job] = Job::Parked;
            }
            Step::Extend(n) => {
                let lease = s.nodes[n].lease?;
                only(s.leases[lease as usize] == Some(Lease::Expired))?;
                only(s.reaping != Some(lease))?;
                s.leases[lease as usize] = Some(Lease::Lives);
            }
            Step::GiveBack(n, token) => {
                let node = &s.nodes[n];
                let lease = node.lease?;
                only(s.claims[token as usize]?.lease == lease && s.leases[lease as usize]? != Lease::Dead)?;
                let knows = node.run.is_some_and(|run| run.token == token)
                    || node.claiming.is_some_and(|claiming| claiming.token == token);
                only(!knows && self.has(Without::GivingBack))?;
                self.give_back(&mut s, token);
            }
            Step::LockDead(lease) => {
                only(s.reaping.is_none() && matches!(s.leases[lease as usize]?, Lease::Expired | Lease::Dead))?;
                only(!Self::is_shared(&s, lease) || !self.has(Without::LeaseLock))?;
                s.reaping = Some(lease);
            }
            Step::Reap { stuck } => {
                let lease = s.reaping.take()?;
                let of_lease = |claim: &Option<Claim>| claim.is_some_and(|claim| claim.lease == lease);
                let claims: Vec<u8> = (0..NAMES as u8).filter(|token| of_lease(&s.claims[*token as usize])).collect();
                only(!stuck || !claims.is_empty())?;
                claims.iter().skip(stuck.into()).for_each(|token| self.give_back(&mut s, *token));
                let dead = if self.has(Without::DeadMark) { Lease::Dead } else { Lease::Expired };
                s.leases[lease as usize] = stuck.then_some(dead);
            }
            Step::Promote(job) => {
                only(s.jobs[job] == Job::Scheduled)?;
                s.jobs[job] = Job::InLine;
            }
            Step::Abort => drop(s.orphan.take()?),
            Step::Kill(n) => {
                s.orphan = s.orphan.or(s.nodes[n].claiming.map(Call::Claim));
                s.nodes[n] = NEW;
            }
            Step::Expire(lease) => {
                only(s.leases[lease as usize] == Some(Lease::Lives))?;
                s.leases[lease as usize] = Some(Lease::Expired);
            }
        }
        Some(s.tidy())
    }

    fn is_own(&self, s: &State, step: Step) -> bool {
        !matches!(step, Step::Insert | Step::Abort) && !self.is_fault(s, step)
    }

    fn broken(&self, s: &State) -> Option<&'static str> {
        let lease_of = |token: u8| s.claims[token as usize].and_then(|claim| s.leases[claim.lease as usize]);
        for (job, key) in self.keys.iter().enumerate() {
            if let Job::Running(token) = s.jobs[job] {
                if lease_of(token).is_none() {
                    return Some(LEASED);
                }
                if key.is_some_and(|key| s.cursors[key].owner != Some(token)) {
                    return Some(ONE_OWNER);
                }
            }
        }
        for (key, cursor) in s.cursors.iter().enumerate() {
            let head = self.head(s, key);
            if cursor.owner.is_none() && head.is_some_and(|head| s.jobs[head] == Job::Parked) {
                return Some(HEADS);
            }
            let version = |job: usize| match s.jobs[job] {
                Job::Finished(version) => Some((version, job)),
                _ => None,
            };
            let mut finished: Vec<_> = self.jobs_of(key).filter_map(version).collect();
            finished.sort_unstable();
            if finished.iter().map(|(version, _)| *version).ne(1..=cursor.version) {
                return Some(VERSIONS);
            }
            if cursor.state != finished.iter().fold(0, |state, (_, job)| fold(state, *job)) {
                return Some(STATE);
            }
            if finished.iter().map(|(_, job)| *job).ne(self.jobs_of(key).take(finished.len())) {
                return Some(ORDER);
            }
        }
        s.stale.then_some(STALE)
    }

    /// Every job that was committed has finished, and nothing is owned, held or claimed.
    fn is_at_rest(&self, s: &State) -> bool {
        s.jobs.iter().all(|job| matches!(job, Job::Unborn | Job::Finished(_)))
            && s.cursors.iter().all(|cursor| cursor.owner.is_none() && cursor.hold.is_none())
            && s.claims.iter().all(Option::is_none)
    }
}

const TWO_OF_A: [Option<usize>; JOBS] = [Some(0), Some(0), Some(1)];
const ONE_PLAIN: [Option<usize>; JOBS] = [None, Some(0), Some(0)];

fn keep_their_promises(what: &str, keys: [Option<usize>; JOBS]) {
    let (faults, at_least) = if is_long() { (3, 300_000) } else { (2, 39_000) };
    holds(&format!("{what}, {faults} faults"), &Cursors { keys, without: Without::Nothing, faults }, at_least);
}

#[test]
fn two_cursors_keep_their_promises() {
    keep_their_promises("two cursors", TWO_OF_A);
}

#[test]
fn a_plain_job_and_a_cursor_keep_their_promises() {
    keep_their_promises("a plain job and a cursor", ONE_PLAIN);
}

#[test]
fn without_a_guard_a_promise_breaks() {
    use Without::*;
    let guards = [
        (TokenOfJobs, STALE),
        (OwnerAndVersion, VERSIONS),
        (Owner, VERSIONS),
        (StateBeforeLettingGo, VERSIONS),
        (LeaseLock, LEASED),
        (OwnersInClaims, ONE_OWNER),
        (PassingOn, HEADS),
        (Hold, ORDER),
        (NewTokens, ONE_OWNER),
        (GivingBack, COMES_TO_REST),
    ];
    for (without, promise) in guards {
        breaks(&format!("without {without:?}"), &Cursors { keys: ONE_PLAIN, without, faults: 2 }, promise);
    }
}

/// Two guards that this model can do without. A token has one owner, who sees every version of its cursor: the version
/// is a second fence. And a lease that was reaped in part may live on: its node settles or gives back the rest.
#[test]
fn the_owner_fences_a_cursor_alone_and_the_lock_of_a_lease_its_claims() {
    for without in [Without::Version, Without::DeadMark] {
        let what = format!("two cursors without {without:?}");
        holds(&what, &Cursors { keys: TWO_OF_A, without, faults: 2 }, 39_000);
    }
}
