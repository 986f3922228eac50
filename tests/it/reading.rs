//! What a claim does not read: dead entries of the line, and the rest of a mailbox.

use serde_json::Value;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::plans::buffers;
use crate::support::database;

/// Claim up to ten jobs. Returns how many rows come (one is the lane's), and the buffers that it touched.
async fn claim_ten(sql: &Client, token: i64) -> (f64, u64) {
    let claim = format!("select * from claim_lanes(1, {token}, 'default', null, 10, 1, '{{}}', '{{}}')");
    let explained = sql.simple_query(&format!("explain (analyze, buffers, format json) {claim}")).await.unwrap();
    let row = explained.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    let plan: Value = serde_json::from_str(row.unwrap()).unwrap();
    (plan[0]["Plan"]["Actual Rows"].as_f64().unwrap(), buffers(&plan[0]["Plan"]))
}

/// While a snapshot is held, the entries of what is gone stay in the line.
#[actix::test]
async fn a_line_of_dead_entries_is_walked_once_and_then_begins_behind_them() {
    let db = database().await;
    let (sql, pin) = (db.sql().await, db.sql().await);
    sql.batch_execute("select begin_lease(1, 'tester', '1 h', '{default}')").await.unwrap();
    pin.batch_execute("begin isolation level repeatable read; select from jobs").await.unwrap();
    sql.batch_execute("insert into jobs (kind) select 'noop' from generate_series(1, 200000)").await.unwrap();
    sql.batch_execute("delete from jobs; select enqueue('noop')").await.unwrap();
    let (rows, from_the_start) = claim_ten(&sql, 10).await;
    db.store.give_back(10).await.unwrap();
    let seen = db.store.move_horizon(&Default::default()).await.unwrap();
    db.store.move_horizon(&seen).await.unwrap();
    let (rows_too, from_the_floor) = claim_ten(&sql, 11).await;
    println!("{from_the_start} buffers, then {from_the_floor}");
    assert_eq!((rows, rows_too), (2.0, 2.0), "one lane, one job");
    assert!(from_the_start > 2000 && from_the_floor < 200, "{from_the_start} buffers, then {from_the_floor}");
}

/// However many jobs wait in a cursor's mailbox.
#[actix::test]
async fn a_deep_mailbox_is_not_walked_over() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "select begin_lease(1, 'tester', '1 h', '{default}');
         insert into jobs (kind, cursor_key, stage)
           select 'noop', 'deep', case n when 1 then 'ready' else 'blocked' end::stage from generate_series(1, 100000) n",
    )
    .await
    .unwrap();
    claim_ten(&sql, 10).await; // this makes the cursor
    db.store.give_back(10).await.unwrap();
    let (rows, buffers) = claim_ten(&sql, 11).await;
    println!("{buffers} buffers");
    assert_eq!(rows, 3.0, "one lane, one cursor, one job");
    assert!(buffers < 300, "{buffers} buffers");
}
