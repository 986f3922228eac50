//! The listener: the node's one connection with session state. It hears notifications and stands
//! sentry for idle queues. Its advisory locks end with its session, so a node that dies, or whose
//! listener is cut off, leaves no post manned. Its calls never wait for a lock.

use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, Recipient, ResponseFuture, WrapFuture};
use futures_util::StreamExt;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client};

use super::bell::Bell;
use super::messages::{Cancel, Cause, Leave, Observe, Observed, Rest, Standing};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::store::{Store, quote};

/// A call on the listener's session that takes longer breaks the session: meanwhile its dispatcher waits.
const DEADLINE: Duration = Duration::from_secs(2);
/// A session that is silent is asked this often if it lives: notifications may have gone astray.
const PING_EVERY: Duration = Duration::from_secs(10);
/// Pauses between attempts to connect.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

pub(crate) struct Listener {
    store: Store,
    metrics: Metrics,
    bell: Bell,
    pools: Vec<Recipient<Cancel>>,
    session: Option<Arc<Client>>,
    /// Which session it is, so that the end of an old one is not taken for the end of this.
    number: u64,
    /// Its server process.
    pid: i32,
    pause: Duration,
}

impl Listener {
    pub(crate) fn new(store: Store, metrics: Metrics, bell: Bell, pools: Vec<Recipient<Cancel>>) -> Self {
        Listener { store, metrics, bell, pools, session: None, number: 0, pid: 0, pause: RECONNECT.0 }
    }

    fn connect(&mut self, ctx: &mut Context<Self>) {
        self.number += 1;
        let (store, address, number) = (self.store.clone(), ctx.address(), self.number);
        let connect = async move {
            let (client, mut connection) = store.target().connect().await?;
            // Drives the session and passes on what it hears, until it ends.
            actix_rt::spawn(async move {
                let mut messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
                while let Some(Ok(message)) = messages.next().await {
                    if let AsyncMessage::Notification(note) = message {
                        address.do_send(Heard { from: note.process_id(), payload: note.payload().to_owned() });
                    }
                }
                address.do_send(Lost(number));
            });
            let listen = async {
                client.batch_execute(&format!("listen {}", quote(store.schema()))).await?;
                Ok(client.query_typed("select pg_backend_pid()", &[]).await?[0].get(0))
            };
            match tokio::time::timeout(DEADLINE, listen).await {
                Ok(listening) => listening.map(|pid: i32| (client, pid)),
                Err(_) => Err(Error::Deadline(DEADLINE)),
            }
        };
        ctx.spawn(connect.into_actor(self).map(|connected, listener, ctx| match connected {
            Ok((client, pid)) if !client.is_closed() => {
                listener.session = Some(Arc::new(client));
                listener.pid = pid;
                listener.pause = RECONNECT.0;
                // What was said meanwhile was not heard.
                listener.wake_all(Cause::Recovered);
            }
            failed => {
                let error = failed.err().map(|e| e.to_string());
                tracing::warn!(error, "the listener cannot connect");
                let pause = listener.pause.mul_f64(0.5 + rand::random::<f64>());
                listener.pause = (listener.pause * 2).min(RECONNECT.1);
                ctx.run_later(pause, |listener, ctx| listener.connect(ctx));
            }
        }));
    }

    fn wake_all(&self, cause: Cause) {
        self.bell.wake_all(cause);
        self.bell.wake_scheduler(cause);
    }

    /// Call a function of one queue on the session.
    fn call(&self, sql: &str, queue: Arc<str>, ctx: &Context<Self>) -> impl Future<Output = Option<String>> + use<> {
        let session = self.session.clone();
        let sql = sql.to_owned();
        let (address, number) = (ctx.address(), self.number);
        async move {
            let call = async { session?.query_typed(&sql, &[(&&*queue, Type::TEXT)]).await.ok() };
            match tokio::time::timeout(DEADLINE, call).await {
                Ok(rows) => rows?.first()?.try_get::<_, Option<String>>(0).ok()?,
                Err(_) => {
                    address.do_send(Lost(number));
                    None
                }
            }
        }
    }

    /// Break a session that does not answer.
    fn ping(&mut self, ctx: &mut Context<Self>) {
        let answer = self.call("select $1", "".into(), ctx);
        ctx.spawn(answer.into_actor(self).map(|_, _, _| ()));
    }
}

/// The session heard a notification.
#[derive(Message)]
#[rtype(result = "()")]
struct Heard {
    /// The server process that notified.
    from: i32,
    payload: String,
}

/// The session of this number ended, or is given up.
#[derive(Message)]
#[rtype(result = "()")]
struct Lost(u64);

impl Actor for Listener {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.connect(ctx);
        ctx.run_interval(PING_EVERY, |listener, ctx| listener.ping(ctx));
    }
}

impl Handler<Heard> for Listener {
    type Result = ();

    fn handle(&mut self, Heard { from, payload }: Heard, _: &mut Self::Context) {
        match payload.split_once(' ') {
            Some(("wake", queue)) => self.bell.wake(queue, Cause::Notified),
            Some(("due", _)) => self.bell.wake_scheduler(Cause::Notified),
            // Queues share posts. Whoever left knows.
            Some(("sentry", _)) if from != self.pid => self.bell.wake_all(Cause::Sentry),
            Some(("cancel", id)) => {
                if let Ok(id) = id.parse() {
                    let cancel = Cancel([id].into());
                    self.pools.iter().for_each(|pool| pool.do_send(cancel.clone()));
                }
            }
            _ => {}
        }
    }
}

impl Handler<Lost> for Listener {
    type Result = ();

    fn handle(&mut self, Lost(number): Lost, ctx: &mut Self::Context) {
        if number == self.number && self.session.take().is_some() {
            tracing::warn!("the listener's connection broke");
            self.metrics.reconnects.inc();
            self.wake_all(Cause::Recovered); // nobody stands sentry any more
            self.connect(ctx);
        }
    }
}

impl Handler<Rest> for Listener {
    type Result = ResponseFuture<Standing>;

    fn handle(&mut self, Rest(queue): Rest, ctx: &mut Self::Context) -> Self::Result {
        let answer = self.call(&self.store.queries().stand_sentry, queue, ctx);
        Box::pin(async move {
            match answer.await.as_deref() {
                Some("sentry") => Standing::Sentry,
                Some("guarded") => Standing::Guarded,
                Some(_) => Standing::Busy,
                None => Standing::Deaf,
            }
        })
    }
}

impl Handler<Leave> for Listener {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, Leave(queue): Leave, ctx: &mut Self::Context) -> Self::Result {
        let left = self.call(&self.store.queries().leave_sentry, queue, ctx);
        Box::pin(async move { drop(left.await) })
    }
}

impl Handler<Observe> for Listener {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        Observed { state: if self.session.is_some() { "listening" } else { "connecting" }.into(), load: 0 }
    }
}

super::messages::stops!(Listener);
