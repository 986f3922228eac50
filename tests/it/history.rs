//! The history: partitions that are made ahead and dropped in time, and an index that is summarized as it grows.

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::{database, value};

const PARTITIONS: &str = "select count(*) from pg_inherits where inhparent = 'finished_jobs'::regclass";

/// Returns the job's id.
async fn complete_one(sql: &Client) -> i64 {
    sql.batch_execute("select enqueue('noop')").await.unwrap();
    let job = sql.query_one("select token, id from claim()", &[]).await.unwrap();
    let (token, id): (i64, i64) = (job.get(0), job.get(1));
    sql.batch_execute(&format!("select settle({id}, {token})")).await.unwrap();
    id
}

#[actix::test]
async fn a_settle_is_never_unwritable_and_a_dump_does_not_stop_it() {
    let db = database().await;
    let sql = db.sql().await;
    assert_eq!(db.store.tend_history(0).await.unwrap(), Some(7));
    let old = "create table finished_jobs_20000101 (like finished_jobs including all);
        alter table finished_jobs attach partition finished_jobs_20000101 for values from ('2000-01-01') to ('2000-01-02')";
    sql.batch_execute(old).await.unwrap();
    let dump = db.sql().await;
    dump.batch_execute("begin; lock table finished_jobs in access share mode").await.unwrap();
    db.store.tend_history(7).await.unwrap();
    assert_eq!(value::<i64>(&sql, PARTITIONS).await, 10, "the old one is kept while the dump runs");
    complete_one(&sql).await;
    dump.batch_execute("commit").await.unwrap();
    db.store.tend_history(7).await.unwrap();
    assert_eq!(value::<i64>(&sql, PARTITIONS).await, 9);
}

#[actix::test]
async fn where_nobody_made_partitions_for_weeks_the_default_one_takes_what_ends() {
    let db = database().await;
    let sql = db.sql().await;
    let detach = "do $$ declare name text; begin
        for name in select inhrelid::regclass from pg_inherits where inhparent = 'finished_jobs'::regclass loop
          if name !~ 'default' then execute format('alter table finished_jobs detach partition %s', name); end if;
        end loop; end $$";
    sql.batch_execute(detach).await.unwrap();
    assert_eq!(value::<i64>(&sql, PARTITIONS).await, 1);
    let id = complete_one(&sql).await;
    assert_eq!(value::<i64>(&sql, "select id from finished_jobs_default").await, id);
}

/// What was finished is found by its id without reading the day, and no vacuum is needed for that, or made.
#[actix::test]
async fn the_index_is_summarized_as_the_history_grows() {
    let db = database().await;
    let sql = db.sql().await;
    let spared = "select count(*) from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'finished_jobs'::regclass and c.reloptions @> '{autovacuum_vacuum_insert_threshold=-1}'";
    assert_eq!(value::<i64>(&sql, spared).await, value::<i64>(&sql, PARTITIONS).await);
    let finished = "insert into finished_jobs select (jsonb_populate_record(f, jsonb_build_object('id', n))).*
        from generate_series(1, 20000) n, finished_jobs f";
    complete_one(&sql).await;
    sql.batch_execute(finished).await.unwrap();
    sql.batch_execute("set enable_seqscan = off").await.unwrap();
    let pages = async || -> i64 {
        let explain = "explain (analyze, buffers, format json) select from finished_jobs where id = 7";
        let plan = value::<Value>(&sql, explain).await;
        plan[0]["Plan"]["Shared Hit Blocks"].as_i64().unwrap()
    };
    let before = pages().await;
    db.store.tend_history(0).await.unwrap();
    let after = pages().await;
    assert!(after * 4 < before, "{after} buffers instead of {before}");
}
