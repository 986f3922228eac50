//! Arbitrary input at the doors that need more than this process: the SQL functions, the table, the import of
//! files, and the service port. proptest prints the input that failed, made as small as it can.
//! `LONG_TESTS=1` tries fifty times as many cases.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use actix::SystemRunner;
use pgcue::{Config, NewJob, Node};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config as Cases, TestCaseError, TestRunner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::Client;

use crate::cli;
use crate::deploy::get;
use crate::support::{Db, database, value};

/// Try a number of cases; panics with the smallest that fails.
fn check<S: Strategy>(cases: u32, input: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let cases = if std::env::var_os("LONG_TESTS").is_some() { cases * 50 } else { cases };
    let config = Cases { cases, failure_persistence: None, max_shrink_iters: 200, ..Cases::default() };
    TestRunner::new(config).run(&input, test).unwrap_or_else(|failure| panic!("{failure}"));
}

/// A database, and a connection to it, outside of any future: proptest is not asynchronous.
fn open() -> (SystemRunner, Db, Client) {
    let system = actix::System::new();
    let (db, sql) = system.block_on(async {
        let db = database().await;
        let sql = db.sql().await;
        (db, sql)
    });
    (system, db, sql)
}

/// What may stand for a value of this type, as SQL.
fn literals(of: &str) -> &'static [&'static str] {
    match of {
        "text" => &[
            "null",
            "''",
            "'a'",
            "'default'",
            "'noop'",
            "'keep'",
            "'merge'",
            "'completed'",
            "'retry'",
            "'release'",
            "'lost'",
            "repeat('x', 600)",
            "repeat('x', 2000)",
            "repeat('🐘', 200)",
            r"e'\n\t\x01'",
            r#"'"%s$1'"#,
        ],
        "smallint" => &["null", "0", "1", "'-1'", "2", "5", "1000", "32767", "'-32768'"],
        "integer" => &[
            "null",
            "0",
            "1",
            "'-1'",
            "2",
            "5",
            "1000",
            "32767",
            "'-32768'",
            "32768",
            "100000",
            "2147483647",
            "'-2147483648'",
        ],
        "bigint" => &["null", "0", "1", "'-1'", "2", "3", "7", "8", "9223372036854775807", "'-9223372036854775808'"],
        "interval" => &[
            "null",
            "'0'",
            "'-1 s'",
            "'1 microsecond'",
            "'30 s'",
            "'1000 years'",
            "'170000000 years'",
            "'-170000000 years'",
        ],
        "timestamp with time zone" => &[
            "null",
            "'infinity'",
            "'-infinity'",
            "now()",
            "'4713-01-01 BC'",
            "'294276-12-31'",
            "(now() + interval '1 h')",
        ],
        "json" => &[
            "null",
            "'null'",
            "'1'",
            "'{}'",
            r#"'{"a":"\u0000"}'"#,
            r#"'"\ud800"'"#,
            r#"'{"a":1e400000}'"#,
            "(repeat('[', 5000) || repeat(']', 5000))::json",
            r#"'{"a":1,"a":2}'"#,
        ],
        "json[]" => {
            &["null", "'{}'", "'{null}'", "array['1', '{}', null]::json[]", "array_fill('1'::json, array[3, 2])"]
        }
        "text[]" => &[
            "null",
            "'{}'",
            "'{null}'",
            "'{noop}'",
            "'{a,null,append}'",
            "'{{a,b},{c,d}}'",
            "'{completed}'",
            "'{release,lost}'",
            "'{retry,bogus}'",
        ],
        "bigint[]" => &["null", "'{}'", "'{null}'", "'{1}'", "'{7,8}'", "'{1,2,3}'", "'{9223372036854775807}'"],
        "smallint[]" => &["null", "'{}'", "'{0}'", "'{null,1}'"],
        "tid[]" => &["null", "'{}'", "'{null}'", "array['(0,1)']::tid[]", "array['(0,1)', '(9,9)', null]::tid[]"],
        "double precision[]" => &["null", "'{}'", "'{0}'", "'{NaN}'", "'{-1}'", "'{null,1}'"],
        "boolean" => &["null", "true", "false"],
        "boolean[]" => &["null", "'{}'", "'{t}'", "'{f,null}'"],
        "on_retry" => &["null", "'hold'", "'pass'"],
        "on_failure" => &["null", "'continue'", "'halt'"],
        other => panic!("no literals for {other}"),
    }
}

/// The functions that are called from outside.
const CALLED: &[&str] = &[
    "enqueue",
    "enqueue_many",
    "collapse",
    "claim",
    "settle",
    "extend",
    "cancel",
    "pause",
    "resume",
    "keep_history",
    "why",
    "promote",
    "reap",
    "halt_cursor",
    "resume_cursor",
    "release_cursor",
    "skip_cursor",
    "set_cursor_state",
    "delete_cursor",
    "begin_lease",
    "end_lease",
    "give_back",
    "claim_lanes",
    "tend_history",
    "backoff",
];

/// A function with its arguments' names and types.
#[derive(Debug, Clone)]
struct Function {
    name: String,
    arguments: Vec<(String, String)>,
}

impl Function {
    fn call(&self, random: &[Index]) -> Call {
        let arguments = self.arguments.iter().zip(random);
        let arguments = arguments.map(|((name, of), n)| format!("{name} => {}::{of}", n.get(literals(of))));
        let text = format!("select {}({})", self.name, arguments.collect::<Vec<_>>().join(", "));
        // The settle in arrays is a node's: it says of its own runs what is true.
        Call { text, roll_back: self.name == "settle" && self.arguments.len() > 10 }
    }
}

#[derive(Debug)]
struct Call {
    text: String,
    /// It may only be tried.
    roll_back: bool,
}

async fn functions(sql: &Client) -> Vec<Function> {
    let query = "select p.proname::text, coalesce((p.proargnames)[:p.pronargs], '{}'), array(
          select format_type(t, null) from unnest(p.proargtypes::oid[]) with ordinality a(t, n) order by n)
        from pg_proc p where p.pronamespace = 'pgcue'::regnamespace and p.proname = any($1) order by 1, p.oid";
    let rows = sql.query(query, &[&CALLED]).await.unwrap();
    let read = |row: &tokio_postgres::Row| {
        let (names, types): (Vec<String>, Vec<String>) = (row.get(1), row.get(2));
        Function { name: row.get(0), arguments: names.into_iter().zip(types).collect() }
    };
    let all: Vec<Function> = rows.iter().map(read).collect();
    assert!(CALLED.iter().all(|name| all.iter().any(|f| f.name == *name)), "{all:?}");
    all
}

/// Things for arguments to meet: jobs 1 to 6, of which two run under claims 7 and 8, one of them a cursor's.
const SCENE: &str = "
    select begin_lease(1, 'n', '1 h'), begin_lease(2, 'm', '1 h');
    select enqueue('noop'), enqueue('append', cursor_key => 'a', on_failure => 'halt');
    select claim_lanes(1, 7, 'default', '{noop}', 1, 1, '{}', '{}'), claim_lanes(2, 8, 'default', '{append}', 1, 1, '{}', '{}');
    select enqueue('noop', cursor_key => 'a'), enqueue('noop', cursor_key => 'b'), enqueue('noop'),
      enqueue('noop', run_at => now() + interval '1 h')";

/// Either a call works, or it says in pgcue's words what is wrong; and the protocol's invariants hold.
#[test]
fn any_arguments_of_the_sql_functions_work_or_are_refused() {
    let (system, db, sql) = open();
    system.block_on(sql.batch_execute(SCENE)).unwrap();
    let function = select(system.block_on(functions(&sql)));
    let call =
        (function, prop::collection::vec(any::<Index>(), 18)).prop_map(|(function, random)| function.call(&random));
    let (worked, refused) = (Cell::new(0), Cell::new(0));
    check(150, prop::collection::vec(call, 1..8), |calls| {
        system.block_on(async {
            for Call { text: call, roll_back } in calls {
                let (begin, end) = if roll_back { ("begin", "rollback") } else { ("", "") };
                sql.batch_execute(begin).await.unwrap();
                let answer = sql.batch_execute(&call).await;
                sql.batch_execute(end).await.unwrap();
                match answer.as_ref().map_err(|e| e.as_db_error().unwrap()) {
                    Ok(()) => worked.set(worked.get() + 1),
                    Err(e) => {
                        // A lease or a token that exists already is named by its key.
                        let known = e.constraint().is_some_and(|name| ["leases_pkey", "claims_pkey"].contains(&name));
                        let clean = e.message().starts_with("pgcue: ") || known;
                        prop_assert!(clean, "{}: {} {}", call, e.code().code(), e.message());
                        refused.set(refused.get() + 1);
                    }
                }
                let found = db.store.verify().await.unwrap();
                prop_assert!(found.is_empty(), "broken by {}: {:?}", call, found);
            }
            Ok(())
        })
    });
    println!("{} calls worked, {} were refused", worked.get(), refused.get());
    assert!(worked.get() > 50 && refused.get() > 50);
}

/// Users write to this table: it refuses by name what a column cannot be, and claims take the rest.
#[test]
fn any_row_of_a_plain_insert_is_claimed_or_refused() {
    const COLUMNS: &[(&str, &str)] = &[
        ("queue", "text"),
        ("kind", "text"),
        ("payload", "json"),
        ("priority", "smallint"),
        ("max_attempts", "smallint"),
        ("expected_at", "timestamp with time zone"),
        ("run_at", "timestamp with time zone"),
        ("timeout", "interval"),
        ("created_at", "timestamp with time zone"),
        ("cursor_key", "text"),
        ("collapse_key", "text"),
        ("headers", "json"),
        ("on_retry", "on_retry"),
        ("on_failure", "on_failure"),
    ];
    let (system, _db, sql) = open();
    let row = prop::collection::vec((select(COLUMNS), any::<Index>()), 1..5);
    check(150, row, |row| {
        let mut values = BTreeMap::from([("kind", "'noop'")]);
        values.extend(row.iter().map(|((column, of), n)| (*column, *n.get(literals(of)))));
        let (columns, values): (Vec<&str>, Vec<&str>) = values.into_iter().unzip();
        let insert = format!("insert into jobs ({}) values ({})", columns.join(", "), values.join(", "));
        system.block_on(async {
            if let Err(error) = sql.batch_execute(&insert).await {
                let e = error.as_db_error().unwrap();
                let (code, constraint) = (e.code().code(), e.constraint());
                let named = code == "23502" && e.column().is_some() || e.message().starts_with("pgcue: ");
                let collapses = code == "23505" && constraint == Some("jobs_collapse");
                prop_assert!(named || collapses, "{}: {} {}", insert, code, e.message());
            }
            let claimed = sql.query("select claim(q, 10) from (select distinct queue as q from jobs) q", &[]).await;
            prop_assert!(claimed.is_ok(), "{}: {:?}", insert, claimed);
            Ok(())
        })
    });
    assert!(system.block_on(value::<i64>(&sql, "select count(*) from jobs where token is not null")) > 20);
}

#[test]
fn a_file_with_one_bad_line_enqueues_nothing_and_the_line_is_named() {
    let (system, db, sql) = open();
    let one_line = |line: &Vec<u8>| !line.contains(&b'\n') && !line.trim_ascii().is_empty();
    let bad = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..40).prop_filter("one line, not empty", one_line),
        r#"\{"kind":"(\\u0000|)"\}|\{"kind":"k",("priority":[1-9][0-9]{5}|"delay":"x"|"k[a-z]":1|"cursor":"\\u0000"|"payload":)\}"#
            .prop_map(String::into_bytes),
    ];
    check(25, (0usize..2000, bad, 0usize..3), |(before, bad, after)| {
        let file = tempfile::NamedTempFile::new().unwrap();
        let good = b"{\"kind\":\"noop\",\"payload\":[1]}\n";
        file.as_file()
            .write_all(&[&good.repeat(before), &bad, b"\n".as_slice(), &good.repeat(after)].concat())
            .unwrap();
        let path = file.path().to_str().unwrap();
        let (code, out, error) = system.block_on(cli::run(&db.url, &["enqueue", "--file", path]));
        let line = format!("pgcue: line {}: ", before + 1);
        prop_assert!(code == 64 && error.starts_with(&line) && out.is_empty(), "{:?}: {} {}", bad, code, error);
        prop_assert_eq!(system.block_on(value::<i64>(&sql, "select count(*) from jobs")), 0);
        Ok(())
    });
}

/// Bytes for the service port: nearly HTTP, or nothing like it.
fn requests() -> impl Strategy<Value = Vec<u8>> {
    let line = "(GET|GET|GET|GET|HEAD|POST|CONNECT|\\PC{0,5}) (/metrics|/healthz|/readyz|/readyz\\?[ -~&&[^ ]]{0,9}\
        |http://x/healthz|/\\PC{0,9}|\\*|/%[0-9a-z%]{0,5}|/\\.\\./\\.\\.) HTTP/(1\\.1|1\\.1|1\\.1|1\\.0|2\\.0|9)";
    let header = "(Host: y|Connection: close|Content-Length: [05]|Transfer-Encoding: chunked|X: [ -~]{0,9}\
        |Expect: 100-continue|Content-Length: (-1|99999999999999999999|\\PC{0,4})|Connection: upgrade|\\PC{0,20})";
    let body = prop_oneof![Just(Vec::new()), prop::collection::vec(any::<u8>(), 0..64)];
    let near = (line, prop::collection::vec(header, 0..3), body).prop_map(|(line, headers, body)| {
        let head: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        [format!("{line}\r\nHost: x\r\n{head}\r\n").into_bytes(), body].concat()
    });
    let huge =
        (1usize..400_000).prop_map(|n| format!("GET /healthz HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(n)).into_bytes());
    let many =
        (1usize..5000).prop_map(|n| format!("GET /readyz HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(n)).into_bytes());
    prop_oneof![8 => near, 1 => huge, 1 => many, 2 => prop::collection::vec(any::<u8>(), 0..200)]
}

/// What the server says to these bytes until it hangs up, or has nothing more to say for now.
async fn ask(address: &str, request: &[u8]) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut answer = Vec::new();
    // It may hang up while we still talk.
    let _ = stream.write_all(request).await;
    let _ = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn whatever_comes_in_at_the_service_port_the_node_lives() {
    let (system, db, _sql) = open();
    let config = Config { demo: true, http: Some("127.0.0.1:0".into()), ..db.config() };
    let node = system.block_on(async { Node::new(config).await.unwrap().start().await.unwrap() });
    let address = node.http().unwrap().to_string();
    let (served, refused) = (Cell::new(0), Cell::new(0));
    // At once, because the server hears some of them out.
    check(4, prop::collection::vec(requests(), 40), |requests| {
        let answers =
            system.block_on(futures_util::future::join_all(requests.iter().map(|request| ask(&address, request))));
        for (request, answer) in requests.iter().zip(answers) {
            let count = if answer.contains(" 200 OK") { &served } else { &refused };
            count.set(count.get() + 1);
            // The node holds its lease: not even /readyz has a reason.
            let failed = answer.starts_with("HTTP/1.1 5") || answer.starts_with("HTTP/1.0 5");
            prop_assert!(!failed, "{:?} is answered by {}", String::from_utf8_lossy(request), answer);
        }
        prop_assert!(system.block_on(get(&address, "/healthz")).starts_with("HTTP/1.1 200"));
        Ok(())
    });
    println!("{} requests were served, {} were not", served.get(), refused.get());
    assert!(served.get() > 5 && refused.get() > 5);
    system.block_on(async {
        let id = db.client.enqueue(NewJob::new("noop", "1")).await.unwrap().id;
        db.reaches(id, "completed").await;
        let observed = node.observe().await;
        assert!(observed.iter().all(|(_, actor)| actor.state != "gone"), "{observed:?}");
        node.drain().await.unwrap();
    });
}
