//! What the database and the nodes know, in as few bytes as tell it apart.

use super::{JOBS, KEYS, NAMES, NODES};

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct State {
    pub jobs: [Job; JOBS],
    pub cursors: [Cursor; KEYS],
    /// The table `claims`, by token.
    pub claims: [Option<Claim>; NAMES],
    /// The table `leases`.
    pub leases: [Option<Lease>; NAMES],
    /// The lease that a reaper's transaction has locked.
    pub reaping: Option<u8>,
    pub nodes: [Node; NODES],
    pub orphan: Option<Call>,
    /// How many more faults will strike.
    pub faults: u8,
    /// A settle was accepted of jobs that its claim did not hold any more.
    pub stale: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Job {
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
pub struct Cursor {
    pub owner: Option<u8>,
    pub version: u8,
    /// The jobs that made it, as the digits of a number.
    pub state: u8,
    pub hold: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Claim {
    pub lease: u8,
    pub open: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Lease {
    Lives,
    /// Its time ran out; a heartbeat may still extend it.
    Expired,
    /// Marked by a reaper that could not take back every job.
    Dead,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Node {
    pub lease: Option<u8>,
    pub claiming: Option<Claiming>,
    pub run: Option<Run>,
}

/// A claim's transaction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Claiming {
    pub token: u8,
    pub lease: u8,
    /// It holds its lease's row.
    pub locked: bool,
}

/// A claimed run as its node has it: what it found, and the jobs `first..end` of its cursor, or one plain job.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Run {
    pub token: u8,
    pub lease: u8,
    /// A bit for each job.
    pub jobs: u8,
    pub version: u8,
    pub state: u8,
}

/// A call that nobody waits for any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Call {
    Claim(Claiming),
    Settle { run: Run, completed: u8 },
}

pub const NEW: Node = Node { lease: None, claiming: None, run: None };

impl State {
    /// Visit every token and every lease that somebody remembers.
    pub fn names(&mut self, token: &mut impl FnMut(&mut u8), lease: &mut impl FnMut(&mut u8)) {
        for job in &mut self.jobs {
            if let Job::Running(name) = job {
                token(name);
            }
        }
        for cursor in &mut self.cursors {
            cursor.owner.iter_mut().for_each(&mut *token);
        }
        for node in &mut self.nodes {
            node.lease.iter_mut().for_each(&mut *lease);
            if let Some(claiming) = &mut node.claiming {
                token(&mut claiming.token);
                lease(&mut claiming.lease);
            }
            if let Some(run) = &mut node.run {
                token(&mut run.token);
                lease(&mut run.lease);
            }
        }
        if let Some(
            Call::Claim(Claiming { token: t, lease: l, .. }) | Call::Settle { run: Run { token: t, lease: l, .. }, .. },
        ) = &mut self.orphan
        {
            token(t);
            lease(l);
        }
        self.reaping.iter_mut().for_each(lease);
    }

    /// One state for all that differ only in names: tokens and leases get theirs in the order in which they are
    /// met, and nodes are alike. (So a node may change its number within a story.) The row of a lease that nobody
    /// remembers is left out: only the reaper would ever read it.
    pub fn tidy(self) -> State {
        let mut swapped = self;
        swapped.nodes.swap(0, 1);
        self.renamed().min(swapped.renamed())
    }

    fn renamed(mut self) -> State {
        let (mut tokens, mut leases) = (Names::default(), Names::default());
        self.names(&mut |token| *token = tokens.of(*token), &mut |lease| *lease = leases.of(*lease));
        for (token, claim) in (0..).zip(std::mem::take(&mut self.claims)) {
            if let Some(claim) = claim {
                self.claims[tokens.of(token) as usize] = Some(Claim { lease: leases.of(claim.lease), ..claim });
            }
        }
        for (new, row) in leases.0.into_iter().zip(std::mem::take(&mut self.leases)) {
            if let Some(new) = new {
                self.leases[new as usize] = row;
            }
        }
        self
    }
}

/// New names for old ones, in the order in which they are asked for.
#[derive(Default)]
struct Names([Option<u8>; NAMES]);

impl Names {
    fn of(&mut self, old: u8) -> u8 {
        let next = self.0.iter().flatten().count() as u8;
        *self.0[old as usize].get_or_insert(next)
    }
}

/// The jobs of a run, in order.
pub fn ones(jobs: u8) -> impl Iterator<Item = usize> {
    (0..JOBS).filter(move |job| jobs & 1 << job != 0)
}

/// What a job does to the state.
pub fn fold(state: u8, job: usize) -> u8 {
    state * 4 + job as u8 + 1
}
