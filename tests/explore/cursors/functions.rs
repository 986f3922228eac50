//! What the functions of the protocol do to a state, each in one transaction or in a part of one.

use super::state::{Call, Claim, Claiming, Job, Lease, Run, State, fold, ones};
use super::{CALLERS, Caller, Cursors, JOBS, KEYS, Without};

impl Cursors {
    /// The job of a cursor that must run next: the held one, or the first of the mailbox.
    pub fn head(&self, s: &State, key: usize) -> Option<usize> {
        let in_mailbox = |job: &usize| matches!(s.jobs[*job], Job::InLine | Job::Parked | Job::Running(_));
        s.cursors[key].hold.or_else(|| self.jobs_of(key).find(in_mailbox))
    }

    /// `claim_lanes`, after its lease is locked: take a plain job, or a run of a free cursor's first jobs.
    pub fn claim(&self, s: &mut State, Claiming { token, lease, .. }: Claiming, job: usize, length: u8) -> Option<Run> {
        if s.jobs[job] != Job::InLine || s.claims[token as usize].is_some() {
            return None;
        }
        let mut run = Run { token, lease, jobs: 1 << job, version: 0, state: 0 };
        if let Some(key) = self.keys[job] {
            run.jobs = self.first_jobs(s, key, length)?;
            let cursor = &mut s.cursors[key];
            if cursor.owner.is_some() && self.has(Without::OwnersInClaims) {
                return None;
            }
            (run.version, run.state) = (cursor.version, cursor.state);
            cursor.owner = Some(token);
        }
        ones(run.jobs).for_each(|job| s.jobs[job] = Job::Running(token));
        s.claims[token as usize] = Some(Claim { lease, open: run.jobs.count_ones() as u8 });
        Some(run)
    }

    /// Exactly so many first jobs of a mailbox, none of which runs; none if a held job is not there yet.
    pub fn first_jobs(&self, s: &State, key: usize, length: u8) -> Option<u8> {
        let runs = |job: &usize| matches!(s.jobs[*job], Job::Running(_));
        let waits = |job: &usize| matches!(s.jobs[*job], Job::InLine | Job::Parked);
        let reads_past = |job: &usize| runs(job) && !self.has(Without::OwnersInClaims);
        let there = self.jobs_of(key).filter(|job| (waits(job) || runs(job)) && !reads_past(job));
        let jobs = there.take_while(waits).take(length.into()).fold(0u8, |jobs, job| jobs | 1 << job);
        let held = s.cursors[key].hold.is_some_and(|hold| !waits(&hold));
        (!held && jobs.count_ones() == length.into()).then_some(jobs)
    }

    /// The first step of `settle`: let go of the cursor, with the state and version that the run made.
    pub fn let_go(&self, s: &mut State, key: usize, run: &Run, completed: u8) {
        let cursor = &mut s.cursors[key];
        let owner = cursor.owner == Some(run.token);
        let version = cursor.version == run.version;
        let fence = match self.without {
            Without::OwnerAndVersion => true,
            Without::Owner => version,
            Without::Version => owner,
            _ => owner && version,
        };
        if !fence {
            return;
        }
        cursor.owner = None;
        cursor.hold = ones(run.jobs).nth(completed.into()).filter(|_| self.has(Without::Hold));
        if self.has(Without::StateBeforeLettingGo) {
            cursor.version = run.version + completed;
            cursor.state = ones(run.jobs).take(completed.into()).fold(run.state, fold);
        }
    }

    /// The jobs of a settle: into history, or back; fenced by their token.
    pub fn settle_jobs(&self, s: &mut State, run: &Run, completed: u8) {
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
    pub fn settle(&self, s: &mut State, run: &Run, completed: u8) {
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
    pub fn pass_on(&self, s: &mut State, key: usize) {
        if s.cursors[key].owner.is_none()
            && self.has(Without::PassingOn)
            && let Some(head) = self.head(s, key)
            && s.jobs[head] == Job::Parked
        {
            s.jobs[head] = Job::InLine;
        }
    }

    /// Take back what is left of a claim, as a settle would that completed nothing.
    pub fn give_back(&self, s: &mut State, token: u8) {
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
    pub fn new_names(&self, s: &State) -> (u8, u8) {
        let (mut tokens, mut leases) = (0u8, 0u8);
        let mut open = *s;
        open.names(&mut |token| tokens |= 1 << *token, &mut |lease| leases |= 1 << *lease);
        for (token, claim) in (0..).zip(s.claims) {
            if let Some(claim) = claim {
                tokens |= 1 << token;
                leases |= 1 << claim.lease;
            }
        }
        (if self.has(Without::NewTokens) { tokens.trailing_ones() as u8 } else { 0 }, leases.trailing_ones() as u8)
    }

    /// The dispatcher calls for a claim.
    pub fn call_claim(&self, s: &State, n: usize) -> Option<Claiming> {
        let node = &s.nodes[n];
        let free = node.claiming.is_none() && node.run.is_none();
        node.lease.filter(|_| free).map(|lease| Claiming { token: self.new_names(s).0, lease, locked: false })
    }

    /// `claim_lanes` begins: it waits for a reaper that holds the lease (none), and then locks it, if it lives (else an
    /// inner none).
    pub fn lock_lease(&self, s: &State, claiming: Claiming) -> Option<Option<Claiming>> {
        let waits = s.reaping == Some(claiming.lease) && self.has(Without::LeaseLock);
        let lives = s.leases[claiming.lease as usize] == Some(Lease::Lives);
        (!waits).then_some(lives.then_some(Claiming { locked: true, ..claiming }))
    }

    /// The claim that a caller is making.
    pub fn claiming(s: &State, caller: Caller) -> Option<Claiming> {
        match (caller, s.orphan) {
            (Caller::Node(n), _) => s.nodes[n].claiming,
            (Caller::Orphan, Some(Call::Claim(claiming))) => Some(claiming),
            _ => None,
        }
    }

    /// A claim ends; its node takes the run, unless it has another lease by now.
    pub fn answer(s: &mut State, caller: Caller, run: Option<Run>) {
        match caller {
            Caller::Orphan => s.orphan = None,
            Caller::Node(n) => {
                s.nodes[n].claiming = None;
                s.nodes[n].run = run.filter(|run| s.nodes[n].lease == Some(run.lease));
            }
        }
    }

    /// True while a claim in flight holds the lease's row.
    pub fn is_shared(s: &State, lease: u8) -> bool {
        let locks =
            |caller| Self::claiming(s, caller).is_some_and(|claiming| claiming.locked && claiming.lease == lease);
        CALLERS.into_iter().any(locks)
    }
}
