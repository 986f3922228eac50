//! Schemas that are made by many at once, and that are newer than the program.

use crate::load::Habits;
use crate::server::insist;
use crate::world::{CALM, World};

/// Six nodes find no schema, and all of them make it.
pub async fn migrated_by_all_at_once(seed: u64) {
    let mut world = World::new(seed).await;
    world.sql().await.batch_execute("drop schema pgcue cascade").await.unwrap();
    for number in 0..6 {
        world.starts(&[("PGCUE_MIGRATE", "true"), CALM[0]]);
        assert_eq!(number + 1, world.size());
    }
    let there = "select (to_regclass('pgcue.leases') is not null)::int::bigint";
    world.eventually("the schema is there", || async { world.count(there).await == 1 }).await;
    for number in 0..6 {
        world.ready(number).await;
    }
    world.load(Habits::default());
    world.progress(300).await;
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0));
}

/// Somebody upgrades the schema: nodes that run go on, a node that starts refuses, and says what to do.
pub async fn newer_than_the_program(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, CALM).await;
    world.load(Habits::default());
    world.progress(100).await;
    let sql = world.sql().await;
    for step in [
        "alter table pgcue.jobs add column of_the_future text default 'x'",
        "alter table pgcue.cursors add column of_the_future text",
        "update pgcue.meta set version = version + 1, functions = 'newer'",
    ] {
        while !insist(&sql, step).await {}
    }
    world.progress(200).await;
    for migrate in ["true", "false"] {
        world.starts(&[("PGCUE_MIGRATE", migrate)]);
        let newcomer = world.size() - 1;
        assert!(!world.ended(newcomer).await.success());
        let log = world.log(newcomer);
        assert!(log.contains("newer than this pgcue knows") && log.contains("upgrade pgcue"), "{log}");
    }
    world.progress(100).await;
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0));
}
