//! The checker: each rule finds what breaks it, in a history and a record that were true before.

use pgcue::checker::{Checker, Rule};
use pgcue::record::{Entry, Event, Fate};

use crate::guards::{Nodes, check};
use crate::support::database;

/// Change the first event that it fits.
fn change(record: &mut [Entry], change: impl Fn(&mut Event) -> bool) {
    assert!(record.iter_mut().any(|entry| change(&mut entry.event)), "the record has such an event");
}

/// Where the first event of a sort is.
fn place(record: &[Entry], which: impl Fn(&Event) -> bool) -> usize {
    record.iter().position(|entry| which(&entry.event)).expect("the record has such an event")
}

#[actix::test]
async fn a_record_that_does_not_fit_the_history_is_found() {
    let db = database().await;
    let mut nodes = Nodes::new(&db);
    nodes.story().await;
    let record = nodes.record();
    assert_eq!(check(&db, record.clone()).await, []);

    type Lie<'a> = (&'a str, &'a dyn Fn(&mut Vec<Entry>), Rule);
    let lies: &[Lie<'_>] = &[
        (
            "a job that was acknowledged is nowhere",
            &|record| {
                change(record, |event| {
                    let Event::Enqueued { key, .. } = event else { return false };
                    *key = "never".into();
                    true
                });
            },
            Rule::Lost,
        ),
        (
            "a job that nobody enqueued",
            &|record| drop(record.remove(place(record, |e| matches!(e, Event::Enqueued { .. })))),
            Rule::Invented,
        ),
        (
            "a job whose enqueue was rolled back",
            &|record| {
                change(record, |event| {
                    let Event::Enqueued { fate, .. } = event else { return false };
                    *fate = Fate::RolledBack;
                    true
                });
            },
            Rule::Invented,
        ),
        (
            "a job that completed, and its handler did not",
            &|record| drop(record.remove(place(record, |e| matches!(e, Event::Ended { .. })))),
            Rule::Cause,
        ),
        (
            "a job that completed without effect",
            &|record| drop(record.remove(place(record, |e| matches!(e, Event::Effect { .. })))),
            Rule::Cause,
        ),
        (
            "an attempt that ended, and nobody was told",
            &|record| {
                let told = |entry: &Entry| matches!(&entry.event, Event::Settled { jobs, .. } if jobs == &[8]);
                record.retain(|entry| !told(entry));
            },
            Rule::Explained,
        ),
        (
            "a stale settle that was accepted",
            &|record| {
                change(record, |event| {
                    let Event::Settled { refused, .. } = event else { return false };
                    !std::mem::take(refused).is_empty()
                });
            },
            Rule::Fenced,
        ),
        (
            "an attempt after the job was settled",
            &|record| {
                let again = record[place(record, |e| matches!(e, Event::Started { .. }))].event.clone();
                let Event::Started { job, .. } = again else { unreachable!() };
                let at = record.last().map_or(0, |last| last.at + 1);
                record.push(Entry { at, process: 2, event: Event::Started { job, attempt: 2, token: 0 } });
            },
            Rule::Fenced,
        ),
        (
            "an attempt after a cancel",
            &|record| {
                record.insert(
                    0,
                    Entry { at: 0, process: 2, event: Event::Cancelled { job: 1, answer: "cancelled".into() } },
                )
            },
            Rule::Cancelled,
        ),
        (
            "two jobs of a cursor at once",
            &|record| {
                let ends = |job: i64| move |e: &Event| matches!(e, Event::Ended { job: j, .. } if *j == job);
                let late = place(record, ends(4));
                record[late].at += 3_600_000_000_000;
            },
            Rule::Overlap,
        ),
    ];
    for (name, lie, rule) in lies {
        let mut record = record.clone();
        lie(&mut record);
        let found = check(&db, record).await;
        assert!(found.iter().any(|violation| violation.rule == *rule), "{name}: {found:?}");
    }
}

#[actix::test]
async fn a_history_that_breaks_a_promise_is_found() {
    for (lie, rule) in [
        ("insert into finished_jobs select * from finished_jobs where id = 1", Rule::Once),
        ("update finished_jobs set run_at = started_at + interval '1 ms' where id = 1", Rule::Early),
        ("update finished_jobs set attempt = max_attempts + 1 where id = 1", Rule::Attempts),
        ("update finished_jobs set state = 'failed' where id = 1", Rule::Cause),
        ("update finished_jobs set state = 'cancelled' where id = 1", Rule::Cause),
        ("update finished_jobs set state = 'lost' where id = 1", Rule::Cause),
        ("update finished_jobs set cursor_version = 9 where cursor_version = 3", Rule::Versions),
        ("update cursors set state = '[]' where key = 'k'", Rule::State),
        ("insert into jobs (kind) values ('left')", Rule::Drained),
        ("update cursors set hold = 1 where key = 'k'", Rule::Drained),
        ("update finished_jobs set payload = json_build_object('key', '1') where payload->>'key' = '2'", Rule::Once),
    ] {
        let db = database().await;
        let mut nodes = Nodes::new(&db);
        nodes.story().await;
        db.sql().await.batch_execute(lie).await.unwrap();
        let found = check(&db, nodes.record()).await;
        assert!(found.iter().any(|violation| violation.rule == rule), "{lie}: {found:?}");
    }
}

#[actix::test]
async fn an_empty_history_proves_nothing() {
    let db = database().await;
    assert!(Checker::default().check(&db.store).await.unwrap_err().to_string().contains("no finished job"));
}
