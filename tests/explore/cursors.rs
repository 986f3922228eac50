//! Leases, claims, tokens, cursors: two nodes that are killed, fall silent and lose answers, and three jobs.
//!
//! | step | stands for |
//! |---|---|
//! | `Insert` | a producer's commit |
//! | `CallClaim`, `LockLease`, `Claim` | the dispatcher's call; `claim_lanes` takes its lease row FOR KEY SHARE; it takes a run and commits |
//! | `CallSettle`, `Settle` | the completer's call; `settle`: `let_go`, `finish`, `put_back`, `pass_on` |
//! | `Park` | `park`, of a claim that meets a job of a busy cursor |
//! | `Extend` | a heartbeat, `extend` |
//! | `GiveBack` | `give_back` of an open claim that a heartbeat named and the node does not know |
//! | `LockDead`, `Reap` | `reap` takes an expired lease FOR UPDATE and marks it dead; `give_back` of its claims, commit |
//! | `Promote` | `promote`, of a job whose delay is over |
//! | `BeginLease` | a node without a lease, or whose watchdog gave it up, begins a new one |
//!
//! Nodes are never waited for, so that each is a ghost at any moment: one that sleeps while its lease is reaped, and
//! settles later. A call whose connection breaks lives on in the server, as an *orphan*: it commits at any time, or
//! never, and nobody hears the answer. A node that was killed begins again, with nothing.
//!
//! A token or lease is new if nobody remembers it. So the space is finite, though every fault may strike any number of
//! times, and retries never end.
//!
//! Left out: losses and their limit, suspects (they are claimed alone), attempts, cancelling and operators, the places in the line
//! and how it is read (see `wakeups`), and marks of mailboxes. A claim takes one run, a node has one run at a time.

use crate::explorer::{COMES_TO_REST, Protocol, breaks, holds};

const NODES: usize = 2;
const JOBS: usize = 3;
const KEYS: usize = 2;
/// Nobody remembers more tokens, or leases, at one time.
const NAMES: usize = 8;

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
    /// A cursor is let go of before its state is committed.
    StateBeforeLettingGo,
    /// A claim looks at its lease, but does not lock it.
    LeaseLockOfClaims,
    /// The reaper looks at leases, but does not lock them.
    LeaseLockOfReaper,
    /// A claim does not look whether the cursor is owned, and reads past running jobs.
    OwnersInClaims,
    /// A claim reads a mailbox past the jobs that run.
    RunningJobsInClaims,
    /// Who lets go of a cursor leaves its next job parked.
    PassingOn,
    /// A job that retries lets others pass.
    Hold,
    /// A node draws the same token each time.
    NewTokens,
    /// Heartbeats do not ask for claims that the node does not know.
    GivingBack,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct State {
    jobs: [Job; JOBS],
    cursors: [Cursor; KEYS],
    /// The table `claims`, by token.
    claims: [Option<Claim>; NAMES],
    /// The table `leases`.
    leases: [Option<Lease>; NAMES],
    /// The lease that a reaper's transaction has locked.
    reaping: Option<u8>,
    nodes: [Node; NODES],
    orphan: Option<Call>,
    /// A settle was accepted of jobs that its claim did not hold any more.
    stale: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Job {
    /// Its producer has not committed.
    Unborn,
    /// `ready`, without a token.
    InLine,
    /// `blocked`.
    Parked,
    Scheduled,
    /// Its token.
    Running(u8),
    /// In history, with the version it produced; 0 for a plain job.
    Finished(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Cursor {
    owner: Option<u8>,
    version: u8,
    /// The jobs that made it, as the digits of a number.
    state: u8,
    hold: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Claim {
    lease: u8,
    open: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Lease {
    Lives,
    /// Its time ran out; a heartbeat may still extend it.
    Expired,
    /// Marked by a reaper that could not take back every job.
    Dead,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Node {
    lease: Option<u8>,
    run: Option<Run>,
    call: Option<Call>,
}

/// A claimed run as its node has it: what it found, and the jobs `first..end` of its cursor, or one plain job.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Run {
    token: u8,
    lease: u8,
    /// A bit for each job.
    jobs: u8,
    version: u8,
    state: u8,
}

/// A call on its way to the server, or within a transaction there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Call {
    /// `locked`: its lease is.
    Claim { token: u8, lease: u8, locked: bool },
    /// The first jobs of the run completed; if there are more, the next one retries and the rest goes back.
    Settle { run: Run, completed: u8, let_go: bool },
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
    CallClaim(usize),
    LockLease(Caller),
    /// Take this job, or a run of the cursor that it belongs to, of at most so many jobs.
    Claim(Caller, usize, u8),
    /// Nothing can be claimed.
    ClaimNothing(Caller),
    CallSettle(usize, u8),
    Settle(Caller),
    Park(usize),
    Extend(usize),
    GiveBack(usize, u8),
    LockDead(u8),
    /// `stuck`: jobs are locked by somebody else, and stay claimed until a later pass.
    Reap { stuck: bool },
    Promote(usize),
    BeginLease(usize),
    /// The connection breaks.
    Orphan(usize),
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
}

impl Cursors {
    fn has(&self, guard: Without) -> bool {
        self.without != guard
    }

    fn jobs_of(&self, key: usize) -> impl Iterator<Item = usize> + '_ {
        (0..JOBS).filter(move |job| self.keys[*job] == Some(key))
    }

    /// The job of a cursor that must run next: the held one, or the first of the mailbox.
    fn head(&self, s: &State, key: usize) -> Option<usize> {
        let in_mailbox = |job: &usize| matches!(s.jobs[*job], Job::InLine | Job::Parked | Job::Running(_));
        s.cursors[key].hold.or_else(|| self.jobs_of(key).find(in_mailbox))
    }

    /// `claim_lanes`, after its lease is locked: take a plain job, or the first jobs of a free cursor's mailbox.
    fn claim(&self, s: &mut State, token: u8, lease: u8, job: usize, longest: u8) -> Option<Run> {
        if s.jobs[job] != Job::InLine || s.claims[token as usize].is_some() {
            return None;
        }
        let mut run = Run { token, lease, jobs: 0, version: 0, state: 0 };
        match self.keys[job] {
            None => run.jobs = 1 << job,
            Some(key) => {
                let cursor = &s.cursors[key];
                if cursor.owner.is_some() && self.has(Without::OwnersInClaims) {
                    return None;
                }
                (run.version, run.state) = (cursor.version, cursor.state);
                let past_running = !self.has(Without::OwnersInClaims) || !self.has(Without::RunningJobsInClaims);
                let scheduled = |job: &usize| matches!(s.jobs[*job], Job::Unborn | Job::Scheduled | Job::Finished(_));
                let runs = |job: &usize| matches!(s.jobs[*job], Job::Running(_));
                if cursor.hold.is_some_and(|hold| s.jobs[hold] == Job::Scheduled) {
                    return None;
                }
                run.jobs = self
                    .jobs_of(key)
                    .filter(|job| !scheduled(job) && !(past_running && runs(job)))
                    .take_while(|job| !runs(job))
                    .take(longest.into())
                    .fold(0, |jobs, job| jobs | 1 << job);
                s.cursors[key].owner = Some(token);
            }
        }
        // A shorter mailbox is the claim of a shorter run.
        if run.jobs == 0 || self.keys[job].is_some() && run.jobs.count_ones() != longest.into() {
            return None;
        }
        ones(run.jobs).for_each(|job| s.jobs[job] = Job::Running(token));
        s.claims[token as usize] = Some(Claim { lease, open: run.jobs.count_ones() as u8 });
        Some(run)
    }

    /// The first step of `settle`: let go of the cursor, with the state and version that the run made.
    fn let_go(&self, s: &mut State, key: usize, run: &Run, completed: u8) {
        let cursor = &mut s.cursors[key];
        let owner = cursor.owner == Some(run.token);
        let version = cursor.version == run.version;
        let fence = match self.without {
            Without::OwnerAndVersion => true,
            Without::Owner => version,
            Without::Version => owner,
            _ => owner && version,
        };
        if fence {
            let retries = ones(run.jobs).nth(completed.into());
            *cursor = Cursor {
                owner: None,
                version: run.version + completed,
                state: ones(run.jobs).take(completed.into()).fold(run.state, fold),
                hold: retries.filter(|_| self.has(Without::Hold)),
            };
        }
    }

    /// The jobs of a settle: into history, or back; fenced by their token.
    fn settle_jobs(&self, s: &mut State, run: &Run, completed: u8) {
        for (n, job) in (0u8..).zip(ones(run.jobs)) {
            let live = !matches!(s.jobs[job], Job::Finished(_));
            if s.jobs[job] != Job::Running(run.token) && (self.has(Without::TokenOfJobs) || !live) {
                continue; // refused
            }
            let claim = s.claims[run.token as usize];
            s.stale |= s.jobs[job] != Job::Running(run.token) || claim.is_none_or(|claim| claim.lease != run.lease);
            let key = self.keys[job];
            s.jobs[job] = match n.cmp(&completed) {
                std::cmp::Ordering::Less => Job::Finished(if key.is_some() { run.version + n + 1 } else { 0 }),
                std::cmp::Ordering::Equal => Job::Scheduled,
                std::cmp::Ordering::Greater => Job::Parked,
            };
            if let Some(claim) = &mut s.claims[run.token as usize] {
                claim.open -= 1;
            }
        }
        if s.claims[run.token as usize].is_some_and(|claim| claim.open == 0) {
            s.claims[run.token as usize] = None;
        }
    }

    /// `settle`.
    fn settle(&self, s: &mut State, run: &Run, completed: u8) {
        let key = self.keys[run.jobs.trailing_zeros() as usize];
        if let Some(key) = key {
            self.let_go(s, key, run, completed);
        }
        self.settle_jobs(s, run, completed);
        if let Some(key) = key {
            self.pass_on(s, key);
        }
    }

    /// Put the head of a free cursor's mailbox back in the line.
    fn pass_on(&self, s: &mut State, key: usize) {
        if s.cursors[key].owner.is_none()
            && self.has(Without::PassingOn)
            && let Some(head) = self.head(s, key)
            && s.jobs[head] == Job::Parked
        {
            s.jobs[head] = Job::InLine;
        }
    }

    /// Take back what is left of a claim: a settle of its runs that nobody completed, and that holds nothing new.
    fn give_back(&self, s: &mut State, token: u8) {
        for job in 0..JOBS {
            if s.jobs[job] == Job::Running(token) {
                s.jobs[job] = if self.keys[job].is_some() { Job::Parked } else { Job::InLine };
            }
        }
        for key in 0..KEYS {
            if s.cursors[key].owner == Some(token) {
                s.cursors[key].owner = None;
                self.pass_on(s, key);
            }
        }
        s.claims[token as usize] = None;
    }

    fn call(s: &mut State, caller: Caller) -> &mut Option<Call> {
        match caller {
            Caller::Node(n) => &mut s.nodes[n].call,
            Caller::Orphan => &mut s.orphan,
        }
    }

    /// A claim's call ends; its node takes the run, unless it has another lease by now.
    fn answer(s: &mut State, caller: Caller, run: Option<Run>) {
        *Self::call(s, caller) = None;
        if let Caller::Node(n) = caller {
            s.nodes[n].run = run.filter(|run| s.nodes[n].lease == Some(run.lease));
        }
    }

    /// Where a token is remembered.
    fn tokens(s: &State) -> u32 {
        let calls = s.nodes.iter().map(|node| node.call).chain([s.orphan]).flatten();
        let runs = s.nodes.iter().filter_map(|node| node.run).map(|run| run.token);
        let open = (0..NAMES as u8).filter(|token| s.claims[*token as usize].is_some());
        runs.chain(open)
            .chain(calls.map(|call| match call {
                Call::Claim { token, .. } => token,
                Call::Settle { run, .. } => run.token,
            }))
            .fold(0, |known, token| known | 1 << token)
    }

    /// Where a lease is remembered.
    fn leases(s: &State) -> u32 {
        let calls = s.nodes.iter().map(|node| node.call).chain([s.orphan]).flatten();
        let runs = s.nodes.iter().filter_map(|node| node.run).map(|run| run.lease);
        let claims = s.claims.iter().flatten().map(|claim| claim.lease);
        let nodes = s.nodes.iter().filter_map(|node| node.lease);
        (runs.chain(claims).chain(nodes).chain(s.reaping))
            .chain(calls.map(|call| match call {
                Call::Claim { lease, .. } => lease,
                Call::Settle { run, .. } => run.lease,
            }))
            .fold(0, |known, lease| known | 1 << lease)
    }

    /// Forget leases that nobody remembers: they only wait for the reaper.
    fn tidy(s: &mut State) {
        let known = Self::leases(s);
        (0..NAMES).filter(|lease| known & 1 << lease == 0).for_each(|lease| s.leases[lease] = None);
        if s.nodes[1] < s.nodes[0] {
            s.nodes.swap(0, 1); // they are alike
        }
    }

    /// True while a claim in flight holds the lease's row.
    fn is_shared(s: &State, lease: u8) -> bool {
        let locks =
            |call: &Call| matches!(call, Call::Claim { lease: l, locked: true, .. } if *l == lease);
        s.nodes.iter().filter_map(|node| node.call).chain(s.orphan).any(|call| locks(&call))
    }
}

/// The jobs of a run, in order.
fn ones(jobs: u8) -> impl Iterator<Item = usize> {
    (0..JOBS).filter(move |job| jobs & 1 << job != 0)
}

/// What a job does to the state.
fn fold(state: u8, job: usize) -> u8 {
    state * 4 + job as u8 + 1
}

impl Protocol for Cursors {
    type State = State;
    type Step = Step;

    fn start(&self) -> State {
        State {
            jobs: [Job::Unborn; JOBS],
            cursors: [Cursor { owner: None, version: 0, state: 0, hold: None }; KEYS],
            claims: [None; NAMES],
            leases: [None; NAMES],
            reaping: None,
            nodes: [Node { lease: None, run: None, call: None }; NODES],
            orphan: None,
            stale: false,
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Insert, Step::Abort, Step::Reap { stuck: false }, Step::Reap { stuck: true }];
        for caller in [Caller::Node(0), Caller::Node(1), Caller::Orphan] {
            steps.extend([Step::LockLease(caller), Step::ClaimNothing(caller), Step::Settle(caller)]);
            for job in 0..JOBS {
                steps.push(Step::Claim(caller, job, 1));
                let company = |other: &usize| self.keys[*other] == self.keys[job] && *other > job;
                steps.extend((0..JOBS).filter(company).take(1).filter(|_| self.keys[job].is_some()).map(|_| Step::Claim(caller, job, 2)));
            }
        }
        for node in 0..NODES {
            steps.extend([Step::CallClaim(node), Step::Extend(node), Step::BeginLease(node)]);
            steps.extend([Step::Orphan(node), Step::Kill(node)]);
            steps.extend((0..=2).map(|completed| Step::CallSettle(node, completed)));
            steps.extend((0..NAMES as u8).map(|token| Step::GiveBack(node, token)));
        }
        steps.extend((0..JOBS).flat_map(|job| [Step::Park(job), Step::Promote(job)]));
        steps.extend((0..NAMES as u8).flat_map(|lease| [Step::LockDead(lease), Step::Expire(lease)]));
        steps
    }

    fn after(&self, mut s: State, step: Step) -> Option<State> {
        let only = |possible: bool| possible.then_some(());
        match step {
            Step::Insert => {
                let next = s.jobs.iter_mut().find(|job| **job == Job::Unborn)?;
                *next = Job::InLine;
            }
            Step::BeginLease(n) => {
                let lost = s.nodes[n].lease.is_none_or(|lease| s.leases[lease as usize] != Some(Lease::Lives));
                only(lost)?;
                let lease = Self::leases(&s).trailing_ones() as u8;
                s.nodes[n].lease = Some(lease);
                s.leases[lease as usize] = Some(Lease::Lives);
            }
            Step::CallClaim(n) => {
                let node = &s.nodes[n];
                only(node.run.is_none() && node.call.is_none())?;
                let lease = node.lease?;
                let token = if self.has(Without::NewTokens) { Self::tokens(&s).trailing_ones() as u8 } else { 0 };
                s.nodes[n].call = Some(Call::Claim { token, lease, locked: false });
            }
            Step::LockLease(caller) => {
                let Call::Claim { token, lease, locked: false } = (*Self::call(&mut s, caller))? else { return None };
                // It waits for a reaper that holds the row.
                only(s.reaping != Some(lease) || !self.has(Without::LeaseLockOfClaims) || !self.has(Without::LeaseLockOfReaper))?;
                match s.leases[lease as usize] {
                    Some(Lease::Lives) => *Self::call(&mut s, caller) = Some(Call::Claim { token, lease, locked: true }),
                    _ => Self::answer(&mut s, caller, None),
                }
            }
            Step::Claim(caller, job, longest) => {
                let Call::Claim { token, lease, locked: true } = (*Self::call(&mut s, caller))? else { return None };
                let run = self.claim(&mut s, token, lease, job, longest)?;
                Self::answer(&mut s, caller, Some(run));
            }
            Step::ClaimNothing(caller) => {
                let Call::Claim { token, lease, locked: true } = (*Self::call(&mut s, caller))? else { return None };
                only((0..JOBS).all(|job| self.claim(&mut s.clone(), token, lease, job, 1).is_none()))?;
                Self::answer(&mut s, caller, None);
            }
            Step::CallSettle(n, completed) => {
                only(s.nodes[n].call.is_none())?;
                let run = s.nodes[n].run?;
                only(completed as u32 <= run.jobs.count_ones())?;
                s.nodes[n].call = Some(Call::Settle { run, completed, let_go: false });
            }
            Step::Settle(caller) => {
                let Call::Settle { run, completed, let_go } = (*Self::call(&mut s, caller))? else { return None };
                let key = self.keys[run.jobs.trailing_zeros() as usize];
                if !self.has(Without::StateBeforeLettingGo) && !let_go && let Some(key) = key {
                    let mut settled = s;
                    self.settle(&mut settled, &run, completed);
                    let owned = s.cursors[key].owner == Some(run.token);
                    (settled.cursors[key].version, settled.cursors[key].state) = (s.cursors[key].version, s.cursors[key].state);
                    s = settled;
                    *Self::call(&mut s, caller) = owned.then_some(Call::Settle { run, completed, let_go: true });
                } else {
                    if let (true, Some(key)) = (let_go, key) {
                        let cursor = &mut s.cursors[key];
                        if cursor.version == run.version {
                            cursor.version = run.version + completed;
                            cursor.state = ones(run.jobs).take(completed.into()).fold(run.state, fold);
                        }
                    } else {
                        self.settle(&mut s, &run, completed);
                    }
                    *Self::call(&mut s, caller) = None;
                }
                if let (Caller::Node(n), None) = (caller, *Self::call(&mut s, caller)) {
                    s.nodes[n].run = None;
                }
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
                only(s.reaping != Some(lease) || !self.has(Without::LeaseLockOfReaper))?;
                s.leases[lease as usize] = Some(Lease::Lives);
            }
            Step::GiveBack(n, token) => {
                let node = &s.nodes[n];
                let lease = node.lease?;
                only(s.claims[token as usize]?.lease == lease && s.leases[lease as usize]? != Lease::Dead)?;
                let knows = node.run.is_some_and(|run| run.token == token)
                    || matches!(node.call, Some(Call::Claim { token: t, .. }) if t == token);
                only(!knows && self.has(Without::GivingBack))?;
                self.give_back(&mut s, token);
            }
            Step::LockDead(lease) => {
                only(s.reaping.is_none() && matches!(s.leases[lease as usize]?, Lease::Expired | Lease::Dead))?;
                only(!Self::is_shared(&s, lease) || !self.has(Without::LeaseLockOfReaper) || !self.has(Without::LeaseLockOfClaims))?;
                s.reaping = Some(lease);
            }
            Step::Reap { stuck } => {
                let lease = s.reaping.take()?;
                let of_lease = |claim: &Option<Claim>| claim.is_some_and(|claim| claim.lease == lease);
                let claims: Vec<u8> = (0..NAMES as u8).filter(|token| of_lease(&s.claims[*token as usize])).collect();
                if stuck {
                    only(!claims.is_empty())?;
                    s.leases[lease as usize] = Some(Lease::Dead);
                } else {
                    claims.iter().for_each(|token| self.give_back(&mut s, *token));
                    s.leases[lease as usize] = None;
                }
            }
            Step::Promote(job) => {
                only(s.jobs[job] == Job::Scheduled)?;
                s.jobs[job] = Job::InLine;
            }
            Step::Orphan(n) => {
                only(s.orphan.is_none())?;
                s.orphan = Some(s.nodes[n].call.take()?);
            }
            Step::Abort => drop(s.orphan.take()?),
            Step::Kill(n) => {
                s.orphan = s.orphan.or(s.nodes[n].call);
                s.nodes[n] = Node { lease: None, run: None, call: None };
            }
            Step::Expire(lease) => {
                only(s.leases[lease as usize] == Some(Lease::Lives))?;
                s.leases[lease as usize] = Some(Lease::Expired);
            }
        }
        Self::tidy(&mut s);
        Some(s)
    }

    fn is_own(&self, s: &State, step: Step) -> bool {
        match step {
            // A node that lives keeps its lease.
            Step::Expire(lease) => s.nodes.iter().all(|node| node.lease != Some(lease)),
            Step::Insert | Step::Orphan(_) | Step::Abort | Step::Kill(_) | Step::Reap { stuck: true } => false,
            _ => true,
        }
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
const PLAIN: [Option<usize>; JOBS] = [None, Some(0), Some(0)];

#[test]
fn two_cursors_keep_their_promises() {
    holds("two cursors", &Cursors { keys: TWO_OF_A, without: Without::Nothing }, 1000);
}

#[test]
fn plain_jobs_and_a_cursor_keep_their_promises() {
    holds("plain jobs and a cursor", &Cursors { keys: PLAIN, without: Without::Nothing }, 1000);
}
