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

use crate::explorer::{COMES_TO_REST, Protocol, breaks, holds, is_long};

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
    /// A settle lets go of the cursor, and leaves its state to a second transaction.
    StateBeforeLettingGo,
    /// A claim looks at its lease, but does not lock it.
    LeaseLockOfClaims,
    /// The reaper looks at leases, but does not lock them.
    LeaseLockOfReaper,
    /// A claim does not look whether the cursor is owned, and reads past running jobs.
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
    /// How many more faults will strike.
    faults: u8,
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
    claiming: Option<Claiming>,
    run: Option<Run>,
}

/// A claim's transaction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Claiming {
    token: u8,
    lease: u8,
    /// It holds its lease's row.
    locked: bool,
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

/// A call that nobody waits for any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Call {
    Claim(Claiming),
    Settle { run: Run, completed: u8 },
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
    /// `stuck`: jobs are locked by somebody else, and stay claimed until a later pass.
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
    faults: u8,
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
                let past_running = !self.has(Without::OwnersInClaims);
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
            let early = !self.has(Without::StateBeforeLettingGo);
            let retries = ones(run.jobs).nth(completed.into());
            *cursor = Cursor {
                owner: None,
                version: if early { run.version } else { run.version + completed },
                state: if early { run.state } else { ones(run.jobs).take(completed.into()).fold(run.state, fold) },
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

    /// A token and a lease that nobody remembers.
    fn new_names(&self, s: &State) -> (u8, u8) {
        let (mut tokens, mut leases) = (0u8, 0u8);
        let mut open = *s;
        Self::names(&mut open, &mut |token| tokens |= 1 << *token, &mut |lease| leases |= 1 << *lease);
        for (token, claim) in (0..).zip(s.claims) {
            if let Some(claim) = claim {
                tokens |= 1 << token;
                leases |= 1 << claim.lease;
            }
        }
        (if self.has(Without::NewTokens) { tokens.trailing_ones() as u8 } else { 0 }, leases.trailing_ones() as u8)
    }

    /// The dispatcher calls for a claim.
    fn call_claim(&self, s: &State, n: usize) -> Option<Claiming> {
        let node = &s.nodes[n];
        let free = node.claiming.is_none() && node.run.is_none();
        node.lease.filter(|_| free).map(|lease| Claiming { token: self.new_names(s).0, lease, locked: false })
    }

    /// `claim_lanes` begins: it locks its lease, if that lives. The inner none: it does not.
    fn lock_lease(&self, s: &State, claiming: Claiming) -> Option<Option<Claiming>> {
        let waits = s.reaping == Some(claiming.lease) && self.locks();
        let lives = s.leases[claiming.lease as usize] == Some(Lease::Lives);
        (!waits).then_some(lives.then_some(Claiming { locked: true, ..claiming }))
    }

    /// Both sides must lock the lease, or neither is stopped by the other.
    fn locks(&self) -> bool {
        self.has(Without::LeaseLockOfClaims) && self.has(Without::LeaseLockOfReaper)
    }

    fn claiming(s: &State, caller: Caller) -> Option<Claiming> {
        match (caller, s.orphan) {
            (Caller::Node(n), _) => s.nodes[n].claiming,
            (Caller::Orphan, Some(Call::Claim(claiming))) => Some(claiming),
            _ => None,
        }
    }

    /// A claim ends; its node takes the run, unless it has another lease by now.
    fn answer(s: &mut State, caller: Caller, run: Option<Run>) {
        match caller {
            Caller::Orphan => s.orphan = None,
            Caller::Node(n) => {
                s.nodes[n].claiming = None;
                s.nodes[n].run = run.filter(|run| s.nodes[n].lease == Some(run.lease));
            }
        }
    }

    /// Visit every name of a token, and of a lease, that somebody remembers.
    fn names(s: &mut State, token: &mut impl FnMut(&mut u8), lease: &mut impl FnMut(&mut u8)) {
        for job in &mut s.jobs {
            if let Job::Running(name) = job {
                token(name);
            }
        }
        s.cursors.iter_mut().filter_map(|cursor| cursor.owner.as_mut()).for_each(&mut *token);
        for node in &mut s.nodes {
            node.lease.iter_mut().for_each(&mut *lease);
        }
        let (claims, runs) =
            s.nodes.iter_mut().map(|node| (&mut node.claiming, &mut node.run)).unzip::<_, _, Vec<_>, Vec<_>>();
        let (claim, run) = match &mut s.orphan {
            Some(Call::Claim(claim)) => (Some(claim), None),
            Some(Call::Settle { run, .. }) => (None, Some(run)),
            None => (None, None),
        };
        for claim in claims.into_iter().flatten().chain(claim) {
            token(&mut claim.token);
            lease(&mut claim.lease);
        }
        for run in runs.into_iter().flatten().chain(run) {
            token(&mut run.token);
            lease(&mut run.lease);
        }
        s.reaping.iter_mut().for_each(&mut *lease);
    }

    /// Forget what nobody remembers, and give names in the order in which they are met: only which names are equal matters.
    fn tidy(s: State) -> State {
        let mut swapped = s;
        swapped.nodes.swap(0, 1); // nodes are alike
        Self::renamed(s).min(Self::renamed(swapped))
    }

    fn renamed(mut s: State) -> State {
        let (mut tokens, mut leases) = (Names::default(), Names::default());
        Self::names(&mut s, &mut |token| *token = tokens.of(*token), &mut |lease| *lease = leases.of(*lease));
        for (token, claim) in std::mem::take(&mut s.claims).into_iter().enumerate() {
            // A claim that is over, or that nobody else remembers, is there as long as it has jobs.
            if let Some(claim) = claim {
                s.claims[tokens.of(token as u8) as usize] = Some(Claim { lease: leases.of(claim.lease), ..claim });
            }
        }
        for (lease, row) in std::mem::take(&mut s.leases).into_iter().enumerate() {
            // Of a lease that nobody remembers, only the reaper will ever read the row.
            if let (Some(new), Some(_)) = (leases.0[lease], row) {
                s.leases[new as usize] = row;
            }
        }
        s
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

    /// True while a claim in flight holds the lease's row.
    fn is_shared(s: &State, lease: u8) -> bool {
        let locks =
            |caller| Self::claiming(s, caller).is_some_and(|claiming| claiming.locked && claiming.lease == lease);
        CALLERS.into_iter().any(locks)
    }
}

const NEW: Node = Node { lease: None, claiming: None, run: None };

/// New names for old ones, in the order in which they are asked for.
#[derive(Default)]
struct Names([Option<u8>; NAMES]);

impl Names {
    fn of(&mut self, old: u8) -> u8 {
        let next = self.0.iter().flatten().count() as u8;
        *self.0[old as usize].get_or_insert(next)
    }
}

const CALLERS: [Caller; 3] = [Caller::Node(0), Caller::Node(1), Caller::Orphan];

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
            Step::Claim(caller, job, longest) => {
                let Claiming { token, lease, .. } = Self::claiming(&s, caller).filter(|claiming| claiming.locked)?;
                let run = self.claim(&mut s, token, lease, job, longest)?;
                Self::answer(&mut s, caller, Some(run));
            }
            Step::ClaimNothing(caller) => {
                let Claiming { token, lease, .. } = Self::claiming(&s, caller).filter(|claiming| claiming.locked)?;
                only((0..JOBS).all(|job| self.claim(&mut s.clone(), token, lease, job, 1).is_none()))?;
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
                only(s.reaping != Some(lease) || !self.has(Without::LeaseLockOfReaper))?;
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
                only(!Self::is_shared(&s, lease) || !self.locks())?;
                s.reaping = Some(lease);
            }
            Step::Reap { stuck } => {
                let lease = s.reaping.take()?;
                let of_lease = |claim: &Option<Claim>| claim.is_some_and(|claim| claim.lease == lease);
                let claims: Vec<u8> = (0..NAMES as u8).filter(|token| of_lease(&s.claims[*token as usize])).collect();
                if stuck {
                    only(!claims.is_empty())?;
                    s.leases[lease as usize] =
                        Some(if self.has(Without::DeadMark) { Lease::Dead } else { Lease::Expired });
                } else {
                    claims.iter().for_each(|token| self.give_back(&mut s, *token));
                    s.leases[lease as usize] = None;
                }
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
        Some(Self::tidy(s))
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

#[test]
fn two_cursors_keep_their_promises() {
    let (faults, at_least) = if is_long() { (3, 300_000) } else { (2, 39_000) };
    holds(
        &format!("two cursors, {faults} faults"),
        &Cursors { keys: TWO_OF_A, without: Without::Nothing, faults },
        at_least,
    );
}

#[test]
fn a_plain_job_and_a_cursor_keep_their_promises() {
    let (faults, at_least) = if is_long() { (3, 300_000) } else { (2, 39_000) };
    holds(
        &format!("a plain job and a cursor, {faults} faults"),
        &Cursors { keys: ONE_PLAIN, without: Without::Nothing, faults },
        at_least,
    );
}

#[test]
fn without_a_guard_a_promise_breaks() {
    use Without::*;
    let guards = [
        (TokenOfJobs, STALE),
        (OwnerAndVersion, VERSIONS),
        (Owner, VERSIONS),
        (StateBeforeLettingGo, VERSIONS),
        (LeaseLockOfClaims, LEASED),
        (LeaseLockOfReaper, LEASED),
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

/// What the model does not need. A token has one owner, who sees every version of its cursor: the version is a
/// second fence. And a lease that was reaped in part could live on, for the rest of its claims has a node again.
#[test]
fn two_guards_are_there_twice() {
    for without in [Without::Version, Without::DeadMark] {
        let what = format!("two cursors without {without:?}");
        holds(&what, &Cursors { keys: TWO_OF_A, without, faults: 2 }, 39_000);
    }
}
