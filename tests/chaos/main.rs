//! Faults, each a scenario: real nodes in processes of their own, a real server, real signals. Every one ends
//! with heal, drain, check: see `world` and `pgcue::checker`.
//!
//! `cargo test --test chaos` runs them all, briefly; `-- network` those of a room; `-- mixed --minutes 30 --nodes 3
//! --seed 7` is the long form. What is random follows from the seed, which is printed.

mod load;
mod mixed;
mod network;
mod node;
mod processes;
mod proxy;
mod schema;
mod server;
mod world;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use futures_util::future::LocalBoxFuture;
use libtest_mimic::{Arguments, Trial};

/// Faults, injected into real nodes and servers; every promise is checked afterwards.
#[derive(Parser)]
#[command(name = "chaos")]
struct Options {
    /// What is random follows from it [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// How long mixed faults go on
    #[arg(long, default_value_t = 0.2)]
    minutes: f64,
    /// How many nodes work meanwhile
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// How many scenarios run at once; they wait more than they work
    #[arg(long, default_value_t = 3)]
    test_threads: usize,
    /// Only scenarios whose name contains one of these
    filter: Vec<String>,
    /// Nothing is captured anyway
    #[arg(long, hide = true)]
    nocapture: bool,
}

type Scenario = Box<dyn FnOnce(u64) -> LocalBoxFuture<'static, ()> + Send>;

fn scenario<F: Future<Output = ()> + 'static>(
    name: &'static str,
    run: impl FnOnce(u64) -> F + Send + 'static,
) -> (&'static str, Scenario) {
    (name, Box::new(|seed| Box::pin(run(seed))))
}

macro_rules! scenarios {
    ($($room:ident: $($name:ident)*;)*) => {
        vec![$($(scenario(concat!(stringify!($room), "::", stringify!($name)), $room::$name)),*),*]
    };
}

fn scenarios() -> Vec<(&'static str, Scenario)> {
    scenarios! {
        processes: killed killed_with_one_cursor stopped_beyond_its_lease aborted_after_a_claim
            aborted_between_effect_and_settle aborted_after_a_settle replaced_one_by_one poisoned_by_an_abort
            poisoned_by_a_stack_overflow a_thread_is_blocked a_clock_is_wrong;
        server: stopped crashed a_backend_is_killed sessions_are_terminated connections_run_out the_disk_is_full
            failed_over settings_are_hostile deadlocks_happen tables_are_rewritten a_snapshot_is_pinned;
        network: blackholed_both_ways blackholed_upwards blackholed_downwards replies_are_swallowed killed_before_a_reply slow reset
            cut_short the_listener_is_deaf pooled_by_pgbouncer;
        schema: migrated_by_all_at_once newer_than_the_program;
    }
}

/// What a scenario needs that is not there.
fn missing(scenario: &str) -> Option<&'static str> {
    match scenario {
        "server::the_disk_is_full" if !rustix::process::geteuid().is_root() => {
            Some("only root can mount a small file system")
        }
        "network::pooled_by_pgbouncer" if !std::path::Path::new(network::PGBOUNCER).exists() => {
            Some("there is no /usr/sbin/pgbouncer (Debian: apt-get install pgbouncer)")
        }
        _ => None,
    }
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("node") {
        return node::main();
    }
    let options = Options::parse();
    let seed = options.seed.unwrap_or_else(|| rand::random::<u32>().into());
    println!("seed {seed}");
    let wanted = |name: &str| options.filter.is_empty() || options.filter.iter().any(|part| name.contains(part));
    let (minutes, nodes) = (options.minutes, options.nodes);
    let mixed = scenario("mixed", move |seed| mixed::mixed(seed, minutes, nodes));
    let scenarios = scenarios().into_iter().chain([mixed]);
    let trials = scenarios.filter(|(name, _)| wanted(name)).map(|(name, scenario)| {
        let missing = missing(name);
        if let Some(missing) = missing {
            println!("{name} is left out: {missing}");
        }
        Trial::test(name, move || {
            let begin = std::time::Instant::now();
            let limit = Duration::from_secs_f64(300.0 + minutes * 60.0);
            let run = async { tokio::time::timeout(limit, scenario(seed)).await.expect("it ends in time") };
            actix_rt::System::new().block_on(run);
            println!("{name}: {:.1} s", begin.elapsed().as_secs_f64());
            Ok(())
        })
        .with_ignored_flag(missing.is_some())
    });
    let arguments = Arguments { test_threads: Some(options.test_threads), ..Arguments::default() };
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
