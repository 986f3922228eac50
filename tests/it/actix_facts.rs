//! What actix 0.13 does when a handler panics, stops or freezes. pgcue's supervision rests on these
//! facts: if one of them changes, so may the supervisor.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use actix::prelude::*;

#[derive(Default)]
struct Unruly {
    restarts: Arc<AtomicU32>,
}

impl Actor for Unruly {
    type Context = Context<Self>;
}

impl Supervised for Unruly {
    fn restarting(&mut self, _: &mut Context<Self>) {
        self.restarts.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Message, Clone, Copy)]
#[rtype(result = "u32")]
enum Do {
    Answer,
    Panic,
    PanicInAnswer,
    PanicInActorFuture,
    Stop,
    Never,
}

impl Handler<Do> for Unruly {
    type Result = ResponseActFuture<Self, u32>;

    fn handle(&mut self, what: Do, ctx: &mut Context<Self>) -> Self::Result {
        let future: ResponseFuture<u32> = match what {
            Do::Answer => Box::pin(async { 1 }),
            Do::Panic => panic!("in handle"),
            Do::PanicInAnswer => Box::pin(async { 1 }),
            Do::PanicInActorFuture => Box::pin(async { panic!("in an actor future") }),
            Do::Stop => {
                ctx.stop();
                Box::pin(async { 1 })
            }
            Do::Never => Box::pin(std::future::pending()),
        };
        Box::pin(future.into_actor(self))
    }
}

struct Detached;

impl Actor for Detached {
    type Context = Context<Self>;
}

impl Handler<Do> for Detached {
    type Result = ResponseFuture<u32>;

    fn handle(&mut self, what: Do, _: &mut Context<Self>) -> Self::Result {
        match what {
            Do::PanicInAnswer => Box::pin(async { panic!("in a detached answer") }),
            _ => Box::pin(async { 1 }),
        }
    }
}

#[actix::test]
async fn a_panic_ends_the_actor_and_the_sender_sees_a_closed_mailbox() {
    for what in [Do::Panic, Do::PanicInActorFuture] {
        let other = Unruly::default().start();
        let actor = Unruly::default().start();
        assert!(matches!(actor.send(what).await, Err(MailboxError::Closed)));
        assert!(matches!(actor.send(Do::Answer).await, Err(MailboxError::Closed)), "and stays closed");
        assert_eq!(other.send(Do::Answer).await.unwrap(), 1, "others of the thread live on");
    }
}

#[actix::test]
async fn a_panic_in_a_detached_answer_ends_only_the_answer() {
    let actor = Detached.start();
    assert!(matches!(actor.send(Do::PanicInAnswer).await, Err(MailboxError::Closed)));
    assert_eq!(actor.send(Do::Answer).await.unwrap(), 1);
}

#[actix::test]
async fn the_supervisor_restarts_after_stop_but_not_after_a_panic_and_never_from_a_factory() {
    let restarts = Arc::new(AtomicU32::new(0));
    let value = Arc::clone(&restarts);
    let actor = Supervisor::start(move |_| Unruly { restarts: value });
    assert_eq!(actor.send(Do::Answer).await.unwrap(), 1);
    let _ = actor.send(Do::Stop).await;
    assert_eq!(actor.send(Do::Answer).await.unwrap(), 1);
    assert_eq!(restarts.load(Ordering::SeqCst), 1, "the same value went on");
    assert!(actor.send(Do::Panic).await.is_err());
    assert!(matches!(actor.send(Do::Answer).await, Err(MailboxError::Closed)), "the supervisor went with it");
    assert_eq!(restarts.load(Ordering::SeqCst), 1);
}

#[actix::test]
async fn an_actor_that_never_answers_blocks_its_mailbox_for_nobody_but_holds_its_answer() {
    let actor = Detached.start();
    let frozen = Unruly::default().start();
    let never = tokio::time::timeout(Duration::from_millis(50), frozen.send(Do::Never)).await;
    assert!(never.is_err());
    assert_eq!(actor.send(Do::Answer).await.unwrap(), 1);
    assert!(frozen.connected(), "it lives on, with the old answer pending: only a rebuilt actor is clean");
}
