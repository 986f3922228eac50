//! Plans stay bounded by the batch: a session that planned everything while the tables were empty works on a
//! million jobs, with `auto_explain` telling how each statement inside the functions really ran.

use std::fmt::Write;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use pgcue::store::Target;
use serde_json::Value;
use tokio_postgres::{AsyncMessage, Client, SimpleQueryMessage};

use crate::support::{Db, database, value};

/// The tables that are never read whole. Leases are few, a row for each node and each claim of an SQL consumer: reap
/// reads them whole, and has no index to do otherwise.
const TABLES: [&str; 4] = ["jobs", "claims", "cursors", "cursor_keys"];

/// So many thousand jobs are ready; a fifth of that runs, is scheduled, is blocked.
const MILLION: i64 = 1000;

/// A session that hears its own notices.
struct Session {
    sql: Client,
    notices: Arc<Mutex<Vec<String>>>,
}

impl Session {
    async fn open(db: &Db) -> Self {
        let (sql, mut connection) = Target::parse(&db.url).unwrap().connect().await.unwrap();
        let notices = Arc::new(Mutex::new(Vec::new()));
        let heard = notices.clone();
        actix_rt::spawn(async move {
            let mut messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
            while let Some(Ok(message)) = messages.next().await {
                if let AsyncMessage::Notice(notice) = message {
                    heard.lock().unwrap().push(notice.message().to_owned());
                }
            }
        });
        let session = Session { sql, notices };
        session.run("set search_path = pgcue, public").await;
        // What was claimed last; a temporary table is no shared buffer.
        session.run("select begin_lease(1, 'plans', '1 h')").await;
        session.run("create temp table got as select * from claim_lanes(1, 1, 'none', null, 1, 1, '{}', '{}')").await;
        session
    }

    /// Returns the first column of the last row, if there is one.
    async fn run(&self, sql: &str) -> Option<String> {
        let messages = self.sql.simple_query(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
        messages.iter().rev().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        })
    }

    /// Plan every statement on tables that hold next to nothing, more often than PostgreSQL plans anew for each call.
    async fn warm_up(&self) {
        for round in 10..18 {
            let token = round * 10;
            self.run(
                "insert into jobs (kind) select 'noop' from generate_series(1, 20);
                 insert into jobs (kind, cursor_key) select 'noop', 'warm' || n % 4 from generate_series(1, 12) n;
                 insert into jobs (kind, cursor_key, run_at)
                   select 'noop', case when n > 2 then 'warm' || n end, clock_timestamp() + '1 ms' from generate_series(1, 5) n",
            )
            .await;
            self.run("select pg_sleep(0.002)").await;
            self.run("select * from promote(1000)").await;
            self.run(&format!("select begin_lease({round}, 'warm', '1 h')")).await;
            self.run(&claim(round, token, "default", 0, 40)).await;
            self.run(&format!("select * from extend({round})")).await;
            self.run(&settle(token, "default")).await;
            self.run(&claim(round, token + 1, "default", 0, 40)).await;
            self.run(&format!("select * from give_back({}, 'release')", token + 1)).await;
            self.run(&claim(round, token + 2, "default", 0, 40)).await;
            self.run(&expire(round)).await;
            self.run("select * from reap()").await;
            self.run("select settle(c.id, c.token) from claim('default', 1) c").await;
        }
    }

    async fn explain(&self) {
        self.run(
            "load 'auto_explain';
             set auto_explain.log_min_duration = 0;
             set auto_explain.log_nested_statements = on;
             set auto_explain.log_analyze = on;
             set auto_explain.log_buffers = on;
             set auto_explain.log_timing = off;
             set auto_explain.log_format = json;
             set auto_explain.log_level = notice",
        )
        .await;
    }

    /// Make a call on a batch of so many rows, and say what is wrong with its plans.
    async fn call(&self, call: &Call) -> Vec<String> {
        self.notices.lock().unwrap().clear();
        let answer = self.run(&call.sql).await.unwrap();
        assert!(!["0", "f"].contains(&answer.as_str()), "{} does something", call.name);
        let notices = std::mem::take(&mut *self.notices.lock().unwrap());
        let plans: Vec<Value> = notices
            .iter()
            .filter_map(|notice| Some(serde_json::from_str(notice.split_once("plan:\n")?.1).unwrap()))
            .collect();
        assert!(plans.len() > 1, "{} is explained with its nested statements: {notices:?}", call.name);
        let mut offences = Vec::new();
        for plan in &plans {
            for what in judge(&plan["Plan"], call.batch) {
                offences.push(format!("{}: {what}\n{}", call.name, show(plan)));
            }
        }
        // Those of the call itself are the most: they are those of all that it did.
        let buffers = plans.iter().map(|plan| buffers(&plan["Plan"])).max().unwrap();
        println!("{}: {answer}, {buffers} buffers", call.name);
        if buffers > call.buffers {
            let all: String = plans.iter().map(show).collect();
            offences.push(format!("{}: {buffers} buffers, and {} are allowed\n{all}", call.name, call.buffers));
        }
        offences
    }
}

/// A call of the protocol: the most rows that it may have to do with, and buffers that it may touch.
struct Call {
    name: &'static str,
    batch: u64,
    buffers: u64,
    sql: String,
}

/// Claim into `got`, reading from a mark on.
fn claim(lease: i64, token: i64, queue: &str, mark: i64, max: i64) -> String {
    format!(
        "truncate got;
         insert into got select * from claim_lanes({lease}, {token}, '{queue}', null, {max}, 5, '{{0}}', '{{{mark}}}', 5);
         select count(*) from got where id is not null"
    )
}

/// Settle what was claimed: most completed, some again later.
fn settle(token: i64, queue: &str) -> String {
    format!(
        "select settle(j.tids, j.ids, array_fill({token}::bigint, array[j.n]), j.outcomes, null, null, null, null, null,
           null, array_fill('{queue}'::text, array[r.n]), r.keys, array_fill({token}::bigint, array[r.n]), r.versions,
           r.versions, null, null, array_fill(false, array[r.n]))
         from (select array_agg(tid) as tids, array_agg(id) as ids, count(*)::int as n,
             array_agg(case when id % 5 = 0 then 'retry' else 'completed' end) as outcomes
           from got where id is not null) j,
         (select coalesce(array_agg(cursor_key), '{{}}') as keys, array_agg(cursor_version) as versions, count(*)::int as n
           from got where id is null and cursor_key is not null) r"
    )
}

fn expire(lease: i64) -> String {
    format!("update leases set ttl = '0', expires_at = now() - interval '1 s' where id = {lease}")
}

/// Load so many thousand ready jobs, and the fifth of it in each other state. The running ones stand first in the
/// lines of both queues; then in the line of `front` come jobs of cursors: of halted and owned ones, of free ones (some
/// with a mailbox of a thousand), and of such that nobody knows yet. No triggers: turning them off for the table would
/// make sessions plan anew. Returns the mark behind the running ones.
async fn load(sql: &Client, thousand: i64) -> i64 {
    let (lots, some) = (200 * thousand, 5 * thousand);
    let text = format!(
        "set session_replication_role = replica;
         delete from jobs; delete from claims; delete from cursors; delete from cursor_keys;
         insert into lanes values ('plain', 0), ('front', 0);
         insert into leases (id, node, ttl, expires_at)
           select n, 'node', '1 h', clock_timestamp() + '1 h'
           from (select generate_series(1000, 1000 + {thousand}) union all select generate_series(100900, 100919)) n(n);
         -- Claims of 200, of which those of front begin with 10 jobs of cursors. The first 20 have leases of their own.
         with added as (
           insert into jobs (id, pos, kind, queue, token, attempt, started_at, cursor_key, cancelled_at)
           overriding system value
           select 1000 + n, 1000 + n, 'noop', case when n < {lots} / 2 then 'front' else 'plain' end, 100000 + n / 200, 1,
             now(), case when n < {lots} / 2 and n % 200 < 10 then 'owned' || n / 200 * 10 + n % 200 end,
             case when n % 1000 = 0 then now() end
           from generate_series(0, {lots} - 1) n
           returning id, token, queue
         )
         insert into claims (token, lease, queue, ids, open, losses)
           select a.token, case when a.token < 100020 then 900 + a.token else 1000 + a.token / 20 % {thousand} end, a.queue,
             array_agg(a.id), count(*), 0
           from added a group by a.token, a.queue;
         insert into cursors (queue, key, halted_at, owner)
           select 'front', c || n, case c when 'halted' then now() end, case c when 'owned' then 100000 + n / 10 end
           from unnest('{{halted,owned,free,deep}}'::text[]) c, generate_series(0, {some} - 1) n
           where c <> 'deep' or n < 100;
         insert into cursor_keys (queue, key) select queue, key from cursors;
         insert into jobs (id, pos, kind, queue, cursor_key) overriding system value
           select {lots} + 1000 + n, {lots} + 1000 + n, 'noop', 'front', case n % 20
             when 0 then 'deep' || n / 20 % 100 when 1 then 'free' || n / 20 when 2 then 'free' || n / 20
             when 3 then 'new' || n / 20
             else case n % 2 when 0 then 'halted' || n % {some} else 'owned' || n % {some} end end
           from generate_series(0, 10 * {thousand} - 1) n;
         insert into jobs (id, pos, kind, queue, cursor_key, stage) overriding system value
           select 2 * {lots} + n, 2 * {lots} + n, 'noop', 'front', case when n < {lots} / 2 then 'deep' || n % 100
             when n % 2 = 0 then 'halted' || n % {some} else 'owned' || n % {some} end, 'blocked'
           from generate_series(0, {lots} - 1) n;
         insert into jobs (id, pos, kind, queue, cursor_key, stage, run_at) overriding system value
           select 3 * {lots} + n, 3 * {lots} + n, 'noop', 'front', case n % 8
             when 0 then 'later' || n when 4 then 'halted' || n % {some} when 6 then 'free' || n % {some} end, 'scheduled',
             now() + make_interval(secs => (n - {lots} / 10) * 10.0)
           from generate_series(0, {lots} - 1) n;
         insert into jobs (id, pos, kind, queue) overriding system value
           select 4 * {lots} + n, 4 * {lots} + n, 'noop', case when n < 50 * {thousand} then 'front' else 'plain' end
           from generate_series(0, 990 * {thousand} - 1) n;
         select setval('jobs_id_seq', max(id)), setval('line', max(pos)) from jobs"
    );
    sql.batch_execute(&text).await.unwrap();
    value(sql, "select max(pos) from jobs where token is not null").await
}

/// Every call once, with the rows of its batch and the buffers that it may touch: two to three times what it did, which
/// stands beside it (PostgreSQL 15, 18).
fn calls(token: i64, mark: i64) -> Vec<Call> {
    let (plain, first, second, suspect, one) = (token, token + 1, token + 2, token + 3, token + 4);
    let settle_one = format!("select settle(id, {one}) from got where id is not null");
    let call = |name, batch, buffers, sql| Call { name, batch, buffers, sql };
    let give_back = format!("select moved from give_back({second}, 'release')");
    vec![
        call("claim of one job", 10, 1_000, claim(1, one, "plain", mark, 1)), // 448; 478: the second time it passes what was settled
        call("settle of one job", 10, 400, settle_one),                       // 185; 186
        call("claim of plain jobs", 1000, 15_000, claim(1, plain, "plain", mark, 1000)), // 5,992; 6,008
        call("extend", 200, 600, "select alive from extend(1010)".into()),    // 237; 237: it lists 200 jobs to cancel
        call("settle of plain jobs", 1000, 20_000, settle(plain, "plain")),   // 8,280; 6,682
        call("claim with cursors in front", 1000, 70_000, claim(1, first, "front", mark, 1000)), // 30,733; 30,733
        call("settle of cursors", 1000, 20_000, settle(first, "front")),      // 7,762; 7,317
        call("claim with cursors again", 1000, 70_000, claim(1, second, "front", mark, 1000)), // 30,734; 30,734
        call("give_back", 1000, 35_000, give_back),                           // 14,607; 11,895
        call("promote", 1000, 45_000, "select promoted from promote(1000)".into()), // 19,613; 19,613
        call("reap", 200, 10_000, "select moved from reap()".into()),         // 3,923; 2,704
        call("claim of a suspect", 100, 150, claim(1, suspect, "front", mark, 1000)), // 21; 21
    ]
}

/// What is wrong with a plan: it reads a table whole, or more rows of one than the batch explains, or sorts such, or
/// searches for what it could fetch, or compares each with each.
fn judge(plan: &Value, batch: u64) -> Vec<String> {
    let mut offences = Vec::new();
    let node = plan["Node Type"].as_str().unwrap();
    let table = plan["Relation Name"].as_str().filter(|name| TABLES.contains(name));
    if let (true, Some(table)) = (node.contains("Seq Scan"), table) {
        offences.push(format!("a sequential scan on {table}"));
    }
    let filter = plan["Filter"].as_str().unwrap_or_default();
    if let (true, Some(table)) = (node.starts_with("Index") && filter.contains("ctid"), table) {
        offences.push(format!("an index of {table} is searched for rows whose place is known"));
    }
    let read = rows(plan);
    let most = if table == Some("claims") { batch / 10 } else { 4 * batch }; // a claim has many jobs
    if let (true, Some(table)) = (read > most, table) {
        offences.push(format!("{read} rows read from {table} by {node}"));
    }
    let compared = times(plan, "Rows Removed by Join Filter") as u64;
    if compared > 20 * batch {
        offences.push(format!("{compared} pairs compared in vain"));
    }
    for below in plan["Plans"].as_array().into_iter().flatten() {
        if node.contains("Sort") && rows(below) > 4 * batch {
            offences.push(format!("{} rows sorted", rows(below)));
        }
        offences.extend(judge(below, batch));
    }
    offences
}

/// How many rows a node looked at, in all its loops.
fn rows(plan: &Value) -> u64 {
    let seen = ["Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck"];
    seen.iter().map(|name| times(plan, name)).sum::<f64>() as u64
}

/// A figure of each loop, for all of them.
fn times(plan: &Value, name: &str) -> f64 {
    plan[name].as_f64().unwrap_or_default() * plan["Actual Loops"].as_f64().unwrap()
}

pub fn buffers(plan: &Value) -> u64 {
    ["Shared Hit Blocks", "Shared Read Blocks"].iter().map(|name| plan[name].as_u64().unwrap()).sum()
}

/// A statement and its plan, for people.
fn show(statement: &Value) -> String {
    fn node(plan: &Value, depth: usize, text: &mut String) {
        let name = |key: &str| plan[key].as_str().map(|name| format!(" {name}")).unwrap_or_default();
        let (kind, index, table) = (&plan["Node Type"], name("Index Name"), name("Relation Name"));
        let (rows, loops, kept) = (rows(plan), &plan["Actual Loops"], &plan["Actual Rows"]);
        let indent = "  ".repeat(depth);
        writeln!(
            text,
            "{indent}{}{index}{table}: {rows} rows seen, {loops} loops of {kept}, {} buffers",
            kind.as_str().unwrap(),
            buffers(plan)
        )
        .unwrap();
        for key in ["Index Cond", "TID Cond", "Filter", "Sort Key"] {
            if let Some(condition) = plan.get(key) {
                writeln!(text, "{indent}    {key}: {condition}").unwrap();
            }
        }
        for below in plan["Plans"].as_array().into_iter().flatten() {
            node(below, depth + 1, text);
        }
    }
    let mut text = format!("{}\n", statement["Query Text"].as_str().unwrap());
    node(&statement["Plan"], 1, &mut text);
    text
}

/// A database whose statistics nobody refreshes, and a session that planned everything on it while it was empty.
async fn planned_on_nothing(before: &[&str]) -> (Db, Session, Client) {
    let db = database().await;
    let sql = db.sql().await;
    for table in ["jobs", "claims", "leases", "cursors", "cursor_keys"] {
        // Without WAL, for speed.
        let set = format!("alter table {table} set unlogged; alter table {table} set (autovacuum_enabled = off)");
        sql.batch_execute(&set).await.unwrap();
    }
    for statements in before {
        sql.batch_execute(statements).await.unwrap();
    }
    let session = Session::open(&db).await;
    session.warm_up().await;
    (db, session, sql)
}

#[actix::test]
async fn plans_made_on_empty_tables_stay_within_the_batch_on_a_million_jobs() {
    plans_stay_within_the_batch(&[], MILLION).await;
}

/// Between two bursts a queue is empty, and vacuum says so.
#[actix::test]
async fn plans_made_after_a_vacuum_of_empty_tables_do_too() {
    plans_stay_within_the_batch(&["vacuum analyze"], MILLION / 5).await;
}

/// Or it is nearly empty: one row in many pages.
#[actix::test]
async fn plans_made_after_a_vacuum_of_nearly_empty_tables_do_too() {
    let burst = "insert into jobs (id, kind, cursor_key) overriding system value select -n, 'noop', n from generate_series(0, 2000) n;
        insert into claims select n, 1, 'none', '{}', 1, 0 from generate_series(0, 2000) n;
        insert into cursors (queue, key) select 'none', n from generate_series(0, 2000) n;
        insert into cursor_keys (queue, key) select queue, key from cursors;
        delete from jobs where cursor_key <> '2000'; delete from claims where token <> 2000;
        delete from cursors where key <> '2000'; delete from cursor_keys where key <> '2000'";
    plans_stay_within_the_batch(&[burst, "vacuum analyze"], MILLION / 5).await;
}

async fn plans_stay_within_the_batch(before: &[&str], thousand: i64) {
    let (_db, session, sql) = planned_on_nothing(before).await;
    let mark = load(&sql, thousand).await;
    session.explain().await;
    let mut offences = Vec::new();
    for (pass, lease) in [(1, 100901), (2, 100902)] {
        for call in calls(1000 * pass, mark) {
            if call.name == "reap" {
                sql.batch_execute(&expire(lease)).await.unwrap();
            }
            offences.extend(session.call(&call).await);
        }
        // They would be claimed first, each alone. And now everything is planned anew, on statistics.
        sql.batch_execute("delete from jobs where stage = 'suspect'; analyze").await.unwrap();
    }
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n\n"));
}

/// The same on fewer jobs, without the pins.
#[actix::test]
async fn without_the_pins_a_plan_goes_over_a_whole_table() {
    let unpinned = "do $$ declare entry regprocedure; setting text; begin
        for entry, setting in
          select p.oid, split_part(s, '=', 1) from pg_proc p cross join unnest(p.proconfig) s
          where p.pronamespace = 'pgcue'::regnamespace and s ~ '^(enable_|jit|plan_cache_mode)'
        loop execute format('alter function %s reset %I', entry, setting); end loop; end $$";
    let (_db, session, sql) = planned_on_nothing(&[unpinned]).await;
    let mark = load(&sql, MILLION / 20).await;
    session.explain().await;
    let mut scans = 0;
    for call in calls(1000, mark) {
        if call.name == "reap" {
            sql.batch_execute(&expire(100901)).await.unwrap();
        }
        scans += session.call(&call).await.iter().filter(|what| what.contains("a sequential scan on jobs")).count();
    }
    assert!(scans > 0, "a sequential scan on jobs is found");
}
