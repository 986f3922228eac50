//! A breadth-first explorer of small protocols: it visits every state that any order of steps can reach, and
//! remembers how it came there.
//!
//! It asks two questions. *Is a promise broken in some state?* And *can all come to rest, from every state, by the
//! protocol's own steps*, that is without faults, luck or new work? The second one is why this is no library: those
//! ask what becomes true on every path that ends, and where everything may be tried again for ever, no path has to.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Instant;

/// A protocol as a state machine.
pub trait Protocol {
    /// Everything that anybody knows at one moment.
    type State: Copy + Eq + Hash + Debug;
    /// What may happen at once.
    type Step: Copy + Debug;

    /// Where it begins.
    fn start(&self) -> Self::State;

    /// Every step that there is.
    fn steps(&self) -> Vec<Self::Step>;

    /// The state after a step; none if it cannot be taken now.
    fn after(&self, state: Self::State, step: Self::Step) -> Option<Self::State>;

    /// False for faults and for what comes from outside: the protocol must not need it to come to rest.
    fn is_own(&self, state: &Self::State, step: Self::Step) -> bool;

    /// The promise that is broken in this state.
    fn broken(&self, state: &Self::State) -> Option<&'static str>;

    /// True if nothing is left to do.
    fn is_at_rest(&self, state: &Self::State) -> bool;
}

/// A model that is larger does not fit a test.
const LIMIT: usize = 10_000_000;

/// What is broken where something is left to do that will never be done.
pub const COMES_TO_REST: &str = "everything comes to rest";

/// A space that was explored until nothing was new, or until a promise was broken.
pub struct Explored<S> {
    states: usize,
    steps: usize,
    never_taken: Vec<S>,
    broken: Option<(&'static str, Vec<S>)>,
}

/// Explore the whole space.
pub fn explore<P: Protocol>(protocol: &P) -> Explored<P::Step> {
    let all = protocol.steps();
    let mut taken = vec![false; all.len()];
    let start = protocol.start();
    let mut numbers = HashMap::from([(start, 0)]);
    // Of each state: where it was reached from, and by which step.
    let mut reached = vec![(0, all[0])];
    let mut rest = vec![protocol.is_at_rest(&start)];
    let mut own_steps = Vec::new();
    let (mut steps, mut broken) = (0, None);
    let mut layer = vec![start];
    let mut from = 0;
    'space: while !layer.is_empty() {
        for state in std::mem::take(&mut layer) {
            for (n, step) in all.iter().enumerate() {
                let Some(after) = protocol.after(state, *step) else { continue };
                taken[n] = true;
                steps += 1;
                let new = numbers.len();
                let to = *numbers.entry(after).or_insert(new);
                if protocol.is_own(&state, *step) {
                    own_steps.push((to, from));
                }
                if to == new {
                    reached.push((from, *step));
                    rest.push(protocol.is_at_rest(&after));
                    layer.push(after);
                    broken = protocol.broken(&after).map(|promise| (promise, to));
                    if broken.is_some() {
                        break 'space;
                    }
                    assert!(new < LIMIT, "more than {LIMIT} states");
                }
            }
            from += 1;
        }
    }
    let broken = broken.or_else(|| stuck(rest, own_steps).map(|state| (COMES_TO_REST, state)));
    let kind = |step: &P::Step| std::mem::discriminant(step);
    let kinds: HashSet<_> = all.iter().zip(taken).filter(|(_, taken)| *taken).map(|(step, _)| kind(step)).collect();
    Explored {
        states: numbers.len(),
        steps,
        never_taken: all.iter().filter(|step| !kinds.contains(&kind(step))).copied().collect(),
        broken: broken.map(|(promise, state)| (promise, story(&reached, state))),
    }
}

/// The first state from which no path of steps (to, from) leads to rest.
fn stuck(mut comes_to_rest: Vec<bool>, mut steps: Vec<(usize, usize)>) -> Option<usize> {
    steps.sort_unstable();
    let mut known: Vec<usize> = (0..comes_to_rest.len()).filter(|state| comes_to_rest[*state]).collect();
    while let Some(to) = known.pop() {
        let first = steps.partition_point(|step| step.0 < to);
        for (_, from) in steps[first..].iter().take_while(|step| step.0 == to) {
            if !std::mem::replace(&mut comes_to_rest[*from], true) {
                known.push(*from);
            }
        }
    }
    comes_to_rest.iter().position(|comes| !comes)
}

/// The shortest way from the start to a state.
fn story<S: Copy>(reached: &[(usize, S)], mut state: usize) -> Vec<S> {
    let mut steps = Vec::new();
    while state != 0 {
        steps.push(reached[state].1);
        state = reached[state].0;
    }
    steps.reverse();
    steps
}

/// `LONG_TESTS=1 cargo test --release --test explore` explores larger spaces.
pub fn is_long() -> bool {
    std::env::var_os("LONG_TESTS").is_some()
}

/// Explore a protocol as it is: no promise may be broken, every kind of step must have been possible somewhere, and the
/// space must not be smaller than when it was last measured by hand.
pub fn holds<P: Protocol>(what: &str, protocol: &P, at_least: usize) {
    let begin = Instant::now();
    let space = explore(protocol);
    println!("{what}: {} states, {} steps, in {:.1?}: holds", space.states, space.steps, begin.elapsed());
    if let Some((promise, story)) = space.broken {
        panic!("{what}: \"{promise}\" is broken after\n{}", told(&story));
    }
    assert!(space.never_taken.is_empty(), "{what}: never possible: {:?}", space.never_taken);
    assert!(space.states >= at_least, "{what}: only {} states, not {at_least}", space.states);
}

/// Explore a protocol without one of its guards: this promise must break.
pub fn breaks<P: Protocol>(what: &str, protocol: &P, promise: &str) {
    let space = explore(protocol);
    let Some((broken, story)) = space.broken else {
        panic!("{what}: no promise is broken in {} states", space.states);
    };
    println!("{what}: \"{broken}\" is broken after {} steps, {} states:\n{}", story.len(), space.states, told(&story));
    assert_eq!(broken, promise, "{what}");
}

fn told<S: Debug>(story: &[S]) -> String {
    story.iter().map(|step| format!("  {step:?}\n")).collect()
}
