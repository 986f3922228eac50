//! `pgcue verify` finds what is corrupted by hand and mends what it says it can; it finds nothing where nothing
//! is wrong, also while nodes work and die.

use std::time::{Duration, Instant};

use pgcue::store::CursorVerb;
use pgcue::{NewJob, OnRetry};
use serde_json::{Value, json};

use crate::cli::run;
use crate::guards::without;
use crate::support::{Db, NodeProcess, database, jobs, somebody_waits, value};

/// A small world in the middle of its work:
/// cursor a runs job 1, and 2 and 3 are parked behind it; cursor b has three finished jobs, and 7 waits for it;
/// cursor c is held by 8, which is scheduled, and 9 is parked; 10 is the next of the free cursor d, and 11 is
/// parked; of the plain jobs 12 runs and 13 waits.
const WORLD: &str = "
    select begin_lease(1, 'tester', '1 h', '{default}');
    select enqueue_many('a', '{1,2,3}', cursor_key => 'a');
    select enqueue_many('b', '{1,2,3,4}', cursor_key => 'b');
    select enqueue_many('c', '{1,2}', cursor_key => 'c');
    select enqueue_many('d', '{1,2}', cursor_key => 'd');
    select enqueue_many('p', '{1,2}', priority => -1);
    create function claim_one(token int, kind text) returns bigint language sql as $$
      select id from claim_lanes(1, token, 'default', array[kind], 1, 1, '{}', '{}') where id is not null $$;
    select claim_one(101, 'a'); select claim_one(102, 'a');
    select claim_one(103, 'b'); select settle(4, 103);
    select claim_one(104, 'b'); select settle(5, 104);
    select claim_one(105, 'b'); select settle(6, 105);
    select claim_one(106, 'c'); select claim_one(107, 'c'); select settle(8, 106, 'retry', delay => '1 h');
    select claim_one(108, 'd'); select claim_one(109, 'd'); select settle(10, 108, 'release');
    select claim_one(110, 'p');";

/// What somebody did by hand.
struct Corruption {
    rule: &'static str,
    repair: Option<&'static str>,
    by: &'static str,
    /// The job that would be stuck, and runs after the repair.
    frees: Option<i64>,
}

const fn corruption(
    rule: &'static str,
    repair: Option<&'static str>,
    frees: Option<i64>,
    by: &'static str,
) -> Corruption {
    Corruption { rule, repair, by, frees }
}

/// A finished copy of job 13.
const FINISH_13: &str = "insert into finished_jobs (id, queue, kind, state, payload, priority, expected_at, run_at, attempt,
      max_attempts, losses, created_at, finished_at)
    select id, queue, kind, 'completed', payload, priority, expected_at, run_at, 1, 1, 0, created_at, now() from jobs where id = 13;";

const CORRUPTIONS: &[Corruption] = &[
    // The two that really happen: a plain DELETE of the job that a cursor waits for, and of one that runs.
    corruption("stranded cursor", Some("pass on"), Some(11), "delete from jobs where id = 10"),
    corruption("miscounted claim", Some("recount"), None, "delete from jobs where id = 12"),
    corruption("owner without a job", Some("let go"), Some(2), "delete from jobs where id = 1"),
    corruption("hold of a job that is gone", Some("drop the hold"), Some(9), "delete from jobs where id = 8"),
    corruption("wrong stage", Some("put in line"), Some(13), "update jobs set stage = 'blocked' where id = 13"),
    corruption("wrong stage", Some("put in line"), Some(7), "update jobs set losses = 1 where id = 7"),
    corruption("impossible count", None, None, "update jobs set attempt = -1 where id = 13"),
    corruption("waits though cancelled", Some("cancel"), None, "update jobs set cancelled_at = now() where id = 13"),
    corruption("more than once", None, None, FINISH_13),
    corruption("more than once", None, None, "insert into finished_jobs select * from finished_jobs where id = 4"),
    corruption("lane that is not read", Some("add the lane"), Some(13), "delete from lanes where priority = -1"),
    corruption("lane that is not read", Some("add the lane"), Some(13), "update jobs set priority = 9 where id = 13"),
    corruption("runs without a claim", Some("put back"), Some(12), "delete from claims where token = 110"),
    corruption("runs without a claim", Some("put back"), Some(1), "delete from claims where token = 101"),
    corruption("runs without a claim", Some("put back"), Some(12), "update jobs set token = 5 where id = 12"),
    corruption("runs without its cursor", Some("put back"), Some(1), "update cursors set owner = null where key = 'a'"),
    corruption("runs without its cursor", Some("put back"), Some(1), "update cursors set owner = 110 where key = 'a'"),
    corruption("miscounted claim", Some("recount"), None, "update claims set open = 5 where token = 110"),
    corruption("claim without a lease", Some("give back"), Some(12), "delete from leases"),
    corruption(
        "lease that nobody ends",
        Some("reap"),
        Some(12),
        // A negative ttl, because the server, from whose start leases are counted, has just started.
        "update leases set ttl = '-1 min', expires_at = now() - interval '1 day'",
    ),
    corruption(
        "parked before the mark",
        Some("reset the mark"),
        Some(9),
        "delete from jobs where id = 8; update cursors set mark = row(0, 'infinity', 10)::place where key = 'c'",
    ),
    corruption("cursor without its key", Some("add the key"), None, "delete from cursor_keys where key = 'b'"),
    corruption("key without its cursor", None, None, "delete from cursors where key = 'b'"),
    corruption(
        "stranded cursor",
        Some("pass on"),
        Some(9),
        "delete from jobs where id = 8; delete from cursors where key = 'c'; delete from cursor_keys where key = 'c'",
    ),
    corruption("cursor twice", None, None, "insert into cursors select * from cursors where key = 'b'"),
    corruption("version fork", None, None, "update finished_jobs set cursor_version = 2 where id = 6"),
    corruption("version gap", None, None, "delete from finished_jobs where id = 5"),
    corruption("version of another history", None, None, "update cursors set version = 2 where key = 'b'"),
    corruption("version of another history", None, None, "delete from finished_jobs where id = 6"),
    corruption("number that comes again", None, None, "select setval('jobs_id_seq', 12)"),
    corruption("number that comes again", None, None, "select setval('line', 1)"),
    corruption(
        "history without a partition",
        Some("make partitions"),
        None,
        "do $$ begin execute 'drop table finished_jobs_' || to_char((now() at time zone 'UTC')::date + 1, 'YYYYMMDD'); end $$",
    ),
];

/// The report of `pgcue verify --json` and its exit code.
async fn verify(db: &Db, repair: bool) -> (i32, Value) {
    let arguments: &[&str] = if repair { &["verify", "--json", "--repair"] } else { &["verify", "--json"] };
    let (code, text, error) = run(&db.url, arguments).await;
    (code, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text} {error}")))
}

fn rules(offences: &Value) -> Vec<&str> {
    offences.as_array().unwrap().iter().map(|offence| offence["rule"].as_str().unwrap()).collect()
}

#[actix::test]
async fn each_corruption_is_found_and_mended_where_it_says_so() {
    for Corruption { rule, repair, by, frees } in CORRUPTIONS {
        let db = database().await;
        let sql = db.sql().await;
        sql.batch_execute(WORLD).await.unwrap();
        assert_eq!(db.store.verify().await.unwrap(), [], "a healthy world");
        sql.batch_execute(by).await.unwrap();

        let (code, report) = verify(&db, false).await;
        assert_eq!((code, &report["repaired"]), (1, &json!([])), "{by}");
        let found = report["found"].as_array().unwrap().iter().find(|offence| offence["rule"] == *rule);
        let found = found.unwrap_or_else(|| panic!("{by}: {report}"));
        assert_eq!(found["repair"].as_str(), *repair, "{by}");

        let (code, report) = verify(&db, true).await;
        let Some(repair) = repair else {
            assert!(code == 1 && rules(&report["found"]).contains(rule), "{by}: only a human can decide: {report}");
            continue;
        };
        assert_eq!((code, &report["found"]), (0, &json!([])), "{by}: nothing is left");
        assert!(report["repaired"].as_array().unwrap().iter().any(|offence| offence["repair"] == *repair), "{by}");
        if let Some(id) = frees {
            let mut tokens = 1000..;
            sql.batch_execute("select begin_lease(2, 'second', '1 h')").await.unwrap();
            loop {
                let claim = "select id from claim_lanes(2, $1, 'default', null, 1, 1, '{}', '{}') where id is not null";
                let token: i64 = tokens.next().unwrap();
                let Some(row) = sql.query_opt(claim, &[&token]).await.unwrap() else { break };
                sql.execute("select settle($1::bigint, $2::bigint)", &[&row.get::<_, i64>(0), &token]).await.unwrap();
            }
            assert_eq!(db.job(*id).await.state, "completed", "{by}: job {id} runs after the repair");
            assert_eq!(db.store.verify().await.unwrap(), [], "{by}: nor afterwards");
        }
    }
}

#[actix::test]
async fn people_see_a_table_and_a_repair_that_has_nothing_to_do_does_nothing() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(WORLD).await.unwrap();
    assert_eq!(verify(&db, false).await, (0, json!({"repaired": [], "found": []})));
    assert_eq!(run(&db.url, &["verify"]).await.1, "every promise is kept\n");
    sql.batch_execute("delete from jobs where id = 10; update jobs set attempt = -1 where id = 13").await.unwrap();
    let (code, table, error) = run(&db.url, &["verify"]).await;
    assert_eq!((code, error.as_str()), (1, "pgcue: 2 offences are left in schema pgcue\n"));
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<_> = table.lines().map(words).collect();
    assert_eq!(lines[0], "RULE QUEUE JOB CURSOR TOKEN FOUND REPAIR");
    let stranded = "stranded cursor default 11 d is the next of a free cursor, and not in the line pass on";
    let counts = "impossible count default 13 has begun -1 attempts and lost its node 0 times yours to decide";
    assert!(lines.contains(&stranded.to_owned()) && lines.contains(&counts.to_owned()), "{table}");

    let offences = db.store.verify().await.unwrap();
    let offence = offences.iter().find(|offence| offence.rule == "stranded cursor").unwrap();
    assert!(db.store.repair(offence).await.unwrap());
    for Corruption { repair, .. } in CORRUPTIONS {
        let repair = repair.filter(|repair| !["reap", "make partitions"].contains(repair)).map(str::to_owned);
        let queue = Some("default".to_owned());
        // On healthy rows of every sort each repair sees that there is nothing to do.
        for (job, key, token) in
            [(1, Some("a"), 101), (7, Some("b"), 0), (8, Some("c"), 0), (11, Some("d"), 0), (12, None, 110)]
        {
            let offence = pgcue::store::Offence {
                repair: repair.clone(),
                queue: queue.clone(),
                job: Some(job),
                cursor_key: key.map(str::to_owned),
                token: Some(token),
                ..offence.clone()
            };
            assert!(!db.store.repair(&offence).await.unwrap(), "{offence:?}");
        }
    }
    let unknown = pgcue::store::Offence { repair: Some("pray".into()), ..offence.clone() };
    let error = db.store.repair(&unknown).await.unwrap_err().to_string();
    assert!(error.contains("there is no repair pray"), "{error}");
    let running: i64 = value(&sql, "select count(*) from jobs where token is not null").await;
    assert_eq!(running, 2, "nobody was disturbed");
}

/// What a retention drops, and a cursor that is deleted and comes back, are no gaps and forks.
#[actix::test]
async fn versions_may_begin_anywhere_and_again() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(WORLD).await.unwrap();
    sql.batch_execute(
        "update finished_jobs set finished_at = finished_at - interval '9 days' where id = 4; select tend_history(7);
         select cancel(7); select delete_cursor('default', 'b'); select enqueue('b', '5', cursor_key => 'b')",
    )
    .await
    .unwrap();
    assert_eq!(value::<i64>(&sql, "select min(cursor_version) from finished_jobs").await, 2);
    let again = "select claim_one(120, 'b'); select settle(14, 120)";
    sql.batch_execute(again).await.unwrap();
    let versions: Vec<i64> =
        value(&sql, "select array_agg(cursor_version order by id) from finished_jobs where state = 'completed'").await;
    assert_eq!(versions, [2, 3, 1]);
    assert_eq!(db.store.verify().await.unwrap(), []);
}

#[actix::test]
async fn a_big_healthy_database_has_no_offence() {
    let db = database().await;
    let sql = db.sql().await;
    let n = jobs(20_000, 100_000);
    sql.batch_execute(&format!(
        "insert into jobs (kind, payload, cursor_key, priority, run_at)
           select 'noop', to_json(n), case when n % 5 = 0 then 'k' || n % 500 end, n % 7, now() + interval '1 h' * (n % 10 = 3)::int
           from generate_series(1, 2 * {n}) n;
         select begin_lease(1, 'tester', '1 h');"
    ))
    .await
    .unwrap();
    // Half of them run through the hands of a node; then some are claimed and stay so.
    let node = db.demo_node().await.start().await.unwrap();
    let begin = Instant::now();
    let finished = "select count(*) from finished_jobs";
    while value::<i64>(&sql, finished).await < n / 2 {
        assert!(begin.elapsed() < Duration::from_secs(120));
        assert_eq!(db.store.verify().await.unwrap(), [], "while it works");
    }
    node.drain().await.unwrap();
    sql.batch_execute("select count(*) from claim_lanes(1, 5, 'default', null, 1000, 10, '{}', '{}')").await.unwrap();
    let begin = Instant::now();
    assert_eq!(db.store.verify().await.unwrap(), []);
    let (live, done): (i64, i64) = (value(&sql, "select count(*) from jobs").await, value(&sql, finished).await);
    println!("{live} live and {done} finished jobs were verified in {:?}", begin.elapsed());
}

/// Cursors that hold and pass, retries, cancels, operators, and a node that dies: every snapshot is whole.
#[actix::test]
async fn nothing_is_found_while_nodes_work_and_die() {
    let db = database().await;
    let sql = db.sql().await;
    let n = jobs(6_000, 60_000);
    let append = |n: i64| {
        let job = match n % 50 {
            0 => NewJob::new("fail", r#"{"times":1}"#),
            _ => NewJob::new("append", json!({"n": n}).to_string()),
        };
        let job = job.cursor(format!("k{}", n % 40)).max_attempts(1000);
        job.on_retry(if n % 2 == 0 { OnRetry::Hold } else { OnRetry::Pass }).priority((n % 3) as i16)
    };
    let job = |n: i64| match n % 4 {
        0 => NewJob::new("sleep", r#"{"ms":2}"#),
        1 => NewJob::new("fail", r#"{"times":1}"#).delay(Duration::from_millis(n as u64 % 1000)),
        _ => append(n / 4),
    };
    let lease = [("PGCUE_LEASE", "3s")];
    let (mut victim, survivor) = (NodeProcess::start(&db, &lease), NodeProcess::start(&db, &lease));
    let producer = async {
        for n in 0..n {
            let id = db.client.enqueue(job(n)).await.unwrap().id;
            if n % 50 == 7 {
                db.store.cancel(id).await.unwrap();
            }
            if n % 100 == 3 {
                let key = format!("k{}", n / 100 % 40);
                for verb in [CursorVerb::Halt, CursorVerb::Release, CursorVerb::Resume] {
                    let _ = db.store.cursor(verb, "default", &key).await; // it may not be there yet
                }
            }
        }
    };
    let mut snapshots = 0;
    let begin = Instant::now();
    let verifier = async {
        loop {
            let left: i64 = value(&sql, "select count(*) from jobs").await;
            assert_eq!(db.store.verify().await.unwrap(), [], "in snapshot {snapshots}, with {left} jobs left");
            snapshots += 1;
            let done: i64 = value(&sql, "select count(*) from finished_jobs").await;
            if done >= n / 3 && victim.is_alive() {
                victim.kill();
            }
            if done >= n {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(300), "{left} left");
        }
    };
    tokio::join!(producer, verifier);
    assert!(survivor.stop().await.success());
    assert_eq!(db.store.verify().await.unwrap(), []);
    let lost: i64 = value(&sql, "select count(*) from finished_jobs where losses > 0 or attempt > 1").await;
    println!("{n} jobs, {lost} of them more than once, {snapshots} snapshots in {:?}", begin.elapsed());
    assert!(snapshots > 20 && lost > 0, "there was something to see");
}

/// A node leaves while a claim of it, whose answer it gave up, is in flight.
#[actix::test]
async fn a_lease_ends_after_the_claim_in_flight() {
    let db = database().await;
    let (sql, slow) = (db.sql().await, db.sql().await);
    let id = db.client.enqueue(NewJob::new("noop", "1")).await.unwrap().id;
    sql.batch_execute("select begin_lease(1, 'leaving', '1 h')").await.unwrap();
    slow.batch_execute("begin; select claim_lanes(1, 5, 'default', null, 1, 1, '{}', '{}')").await.unwrap();
    let (left, ()) = tokio::join!(db.store.end_lease(1), async {
        somebody_waits(&sql).await;
        slow.batch_execute("commit").await.unwrap();
    });
    assert_eq!(left.unwrap(), 1, "the job goes back");
    assert_eq!(db.store.verify().await.unwrap(), []);
    assert_eq!((db.job(id).await.state, value::<i64>(&sql, "select count(*) from leases").await), ("ready".into(), 0));
}

/// A job is promoted between the moment a claim looks at the mailbox and the moment it locks the cursor. The
/// claim's mark must not pass it: parked there, nobody would see it again.
#[actix::test]
async fn a_job_that_is_promoted_under_a_claim_is_not_left_before_the_mark() {
    let db = database().await;
    let (sql, gate) = (db.sql().await, db.sql().await);
    sql.batch_execute(
        "select begin_lease(1, 'tester', '1 h'); select enqueue('noop', cursor_key => 'k');
         select claim_lanes(1, 2, 'default', null, 1, 1, '{}', '{}'); select settle(1, 2);
         update cursors set mark = row(-40000, '-infinity', 0), next_mark = row(-40000, '-infinity', 0);
         select enqueue('noop', cursor_key => 'k', run_at => clock_timestamp() + interval '1 ms');
         select enqueue_many('noop', '{1,2,3}', cursor_key => 'k'); select setval('horizon', 5)",
    )
    .await
    .unwrap();
    without(
        &sql,
        "take_runs",
        "where c.ctid = newest.tid and c.owner is null",
        "where pg_advisory_xact_lock(5)::text = '' and c.ctid = newest.tid and c.owner is null",
    )
    .await;
    gate.batch_execute("select pg_advisory_lock(5)").await.unwrap();
    let claim = |token: i64| {
        let claim = "select id from claim_lanes(1, $1, 'default', null, 1, 1, '{}', '{}') where id is not null";
        let sql = &sql;
        async move { sql.query_opt(claim, &[&token]).await.unwrap().map(|row| row.get::<_, i64>(0)) }
    };
    let (first, ()) = tokio::join!(claim(100), async {
        somebody_waits(&gate).await;
        while db.store.promote(10).await.unwrap().0 == 0 {}
        gate.batch_execute("select pg_advisory_unlock(5)").await.unwrap();
    });
    let (mut running, mut token) = (first, 100);
    while let Some(id) = running {
        assert_eq!(claim(token + 1).await, None, "parks the others");
        assert_eq!(db.store.verify().await.unwrap(), [], "while job {id} runs");
        sql.execute("select settle($1::bigint, $2::bigint)", &[&id, &token]).await.unwrap();
        token += 2;
        running = claim(token).await;
    }
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0, "all of them ran");
}

/// A job whose id is smaller than those of the run, because somebody chose it.
#[actix::test]
async fn a_job_of_an_odd_id_that_is_parked_under_a_run_is_not_left_before_the_mark() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "select begin_lease(1, 'tester', '1 h'); select setval('jobs_id_seq', 100), setval('horizon', 200);
         select enqueue_many('noop', '{1,2}', cursor_key => 'k');
         select claim_lanes(1, 5, 'default', null, 1, 1, '{}', '{}');
         insert into jobs (id, kind, cursor_key) overriding system value values (50, 'noop', 'k');
         select claim_lanes(1, 6, 'default', null, 1, 1, '{}', '{}')",
    )
    .await
    .unwrap();
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs where stage = 'blocked'").await, 2);
    sql.batch_execute("select settle(101, 5)").await.unwrap();
    assert_eq!(value::<i64>(&sql, "select id from claim()").await, 50);
}
