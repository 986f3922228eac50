//! Processes that die, stall, lie about the time, and come back.

use std::process::Command;
use std::time::Duration;

use pgcue::Task;
use pgcue::record::Event;
use rustix::process::Signal;

use crate::load::Habits;
use crate::node::{ABORT, Act, Args, Step, Work};
use crate::world::{CALM, LEASE, World};

async fn kills(seed: u64, nodes: usize, habits: Habits) {
    let mut world = World::new(seed).await;
    world.nodes(nodes, &[]).await;
    world.load(habits);
    for _ in 0..4 {
        world.pass(700).await;
        world.progress(50).await;
        world.breaks("SIGKILL");
        // One that does nothing is no loss: when there is little to do, one node does it all.
        let victim = world.holder().await;
        world.kill(victim);
        world.heals("SIGKILL");
        world.restart(victim, &[]).await;
    }
    let checked = world.check().await;
    assert!(checked.lost > 0, "a kill must have hit something");
}

/// SIGKILL, four times, of a node that holds jobs, while the others work.
pub async fn killed(seed: u64) {
    kills(seed, 3, Habits::default()).await;
}

/// The same with one cursor: its order is strict whatever dies.
pub async fn killed_with_one_cursor(seed: u64) {
    kills(seed, 2, Habits { producers: 1, cursors: 1, failing: 0.1, ms: 5, ..Habits::default() }).await;
}

/// SIGSTOP for longer than the lease, then SIGCONT: a ghost, whose settles must be refused.
pub async fn stopped_beyond_its_lease(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    // Long jobs: whenever one that holds some is stopped, they run.
    world.load(Habits { ms: 1500, batch: 2, pause: Duration::from_millis(120), ..Habits::default() });
    world.progress(50).await;
    world.breaks("SIGSTOP");
    let ghost = world.holder().await;
    world.signal(ghost, Signal::STOP);
    world.eventually("its lease ends", || async { !world.has_lease(ghost).await }).await;
    tokio::time::sleep(LEASE / 2).await;
    world.signal(ghost, Signal::CONT);
    world.heals("SIGSTOP");
    world.eventually("the ghost begins a new lease", || async { world.has_lease(ghost).await }).await;
    world.progress(100).await;
    let checked = world.check().await;
    assert!(checked.refused() > 0, "the ghost must have tried to settle");
}

async fn aborts(seed: u64, point: &str) {
    let mut world = World::new(seed).await;
    world.nodes(1, &[]).await;
    world.breaks(point);
    world.node(&[(ABORT, point)]).await;
    // More than the slots can do: whatever it has just claimed or settled, it has other jobs.
    world.load(Habits { ms: 60, ..Habits::default() });
    assert!(!world.ended(1).await.success(), "it must have aborted");
    world.heals(point);
    world.restart(1, &[]).await;
    world.progress(100).await;
    let checked = world.check().await;
    assert!(checked.lost > 0, "it must have held jobs");
}

/// A process that ends just after its claim was committed.
pub async fn aborted_after_a_claim(seed: u64) {
    aborts(seed, "claimed:5").await;
}

/// A process that ends between a job's effect and its settle.
pub async fn aborted_between_effect_and_settle(seed: u64) {
    aborts(seed, "ended:30").await;
}

/// A process that ends just after a settle was committed, while others of its jobs run.
pub async fn aborted_after_a_settle(seed: u64) {
    aborts(seed, "settled:5").await;
}

/// Three nodes are replaced one by one, as a rollout does it. Nothing is a fault here: no attempt may be lost or
/// made twice.
pub async fn replaced_one_by_one(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(3, CALM).await;
    world.load(Habits::default());
    for number in 0..3 {
        world.progress(50).await;
        assert!(world.stop(number).await.success(), "node {number} drains");
        world.restart(number, CALM).await;
    }
    world.progress(50).await;
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0));
}

/// A job that takes down every node that runs it is set aside; its neighbours finish.
async fn poison(seed: u64, act: Act, cursor: bool) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.breaks("poison");
    for n in 0..60 {
        let act = if n == 30 { act } else { Act::Complete };
        let (key, ms) = (format!("{n}"), 10);
        let args = Args { key: key.clone(), ms, act };
        let job = if cursor { Step(args).job().cursor("poisoned") } else { Work(args).job() };
        world.enqueue(&key, job).await;
    }
    let left = "select count(*) from pgcue.jobs";
    let mut deaths = 0;
    while world.count(left).await > 0 {
        for number in 0..2 {
            if !world.is_alive(number) {
                deaths += 1;
                world.restart(number, &[]).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.heals("poison");
    let completed = world.count("select count(*) from pgcue.finished_jobs where state = 'completed'").await;
    let why = "select count(*) from pgcue.finished_jobs where state = 'lost' and losses = 3 and payload->>'key' = '30'";
    assert_eq!((completed, world.count(why).await), (59, 1));
    assert!(
        (2..=4).contains(&deaths),
        "three nodes, unless a machine is so slow that leases end by themselves: {deaths}"
    );
    let checked = world.check().await;
    assert_eq!(checked.quarantined, 1);
}

/// See [`poison`].
pub async fn poisoned_by_an_abort(seed: u64) {
    poison(seed, Act::Abort, false).await;
}

/// The same, by endless recursion, among the jobs of a cursor.
pub async fn poisoned_by_a_stack_overflow(seed: u64) {
    poison(seed, Act::Overflow, true).await;
}

/// A handler blocks its thread for far longer than its timeout: it costs one attempt and one slot, which is rebuilt.
pub async fn a_thread_is_blocked(seed: u64) {
    let mut world = World::new(seed).await;
    let slots = [CALM[0], ("PGCUE_QUEUES__DEFAULT__SLOTS", "4"), ("PGCUE_QUEUES__DEFAULT__THREADS", "2")];
    world.node(&slots).await;
    let blocks = Work(Args { key: "blocks".into(), ms: 15_000, act: Act::Block });
    let blocks = blocks.job().timeout(Duration::from_millis(300)).max_attempts(1);
    let blocked = world.enqueue("blocks", blocks).await;
    for n in 0..200 {
        let key = format!("{n}");
        world.enqueue(&key, Work(Args { key: key.clone(), ms: 5, ..Args::default() })).await;
    }
    let settled = format!(
        "select count(*) from pgcue.finished_jobs where id = {blocked} and error like 'blocked its thread%'
           and finished_at < started_at + interval '14 s'"
    );
    world.eventually("it is given up while it blocks", || async { world.count(&settled).await == 1 }).await;
    let checked = world.check().await;
    assert_eq!((checked.finished, checked.lost), (201, 0));
}

/// Two nodes whose clocks are an hour ahead and an hour behind: only the database's clock counts.
pub async fn a_clock_is_wrong(seed: u64) {
    let mut world = World::new(seed).await;
    let shim = world.path("wrong_clock.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chaos/wrong_clock.c");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&shim).arg(source).arg("-ldl").status();
    assert!(compiled.unwrap().success());
    let shim = shim.to_string_lossy().into_owned();
    for wrong_by in ["3600", "-3600"] {
        world.node(&[CALM[0], ("LD_PRELOAD", &shim), ("WRONG_BY", wrong_by)]).await;
    }
    world.load(Habits::default());
    world.progress(500).await;
    for (number, wrong_by) in [(0, 3600), (1, -3600)] {
        let log = world.log(number);
        let said: jiff::Timestamp = log.split_whitespace().next().unwrap().parse().unwrap();
        let off = jiff::Timestamp::now().as_second() - said.as_second() + wrong_by;
        assert!((0..300).contains(&off), "the clock of node {number} must be wrong: {said}");
    }
    let lost = |event: &Event| matches!(event, Event::LeaseLost { .. });
    assert_eq!(world.recorded(lost), 0);
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0));
}
