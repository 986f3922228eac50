//! The service port: `/metrics`, `/healthz`, `/readyz`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use actix_web::dev::ServerHandle;
use actix_web::{App, HttpResponse, HttpServer, web};
use tokio::sync::Mutex;

use crate::actors::keeper::LeaseKeeper;
use crate::actors::messages::Observe;
use crate::actors::scheduler::Scheduler;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::store::Store;

/// A server that runs.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    handle: ServerHandle,
}

impl Server {
    pub(crate) async fn stop(self) {
        self.handle.stop(true).await;
    }
}

struct State {
    store: Store,
    metrics: Metrics,
    keeper: Addr<LeaseKeeper>,
    scheduler: Addr<Scheduler>,
    counted: Mutex<Counted>,
}

/// Counting live jobs reads the whole table: not more often than this allows.
struct Counted {
    not_before: Instant,
}

const COUNT_EVERY: Duration = Duration::from_secs(5);
/// Counting takes at most this share of the time: one part in so many.
const COUNT_SHARE: u32 = 20;

/// Serve until stopped.
pub(crate) fn serve(
    address: &str,
    store: Store,
    metrics: Metrics,
    keeper: Addr<LeaseKeeper>,
    scheduler: Addr<Scheduler>,
) -> Result<Server> {
    let counted = Mutex::new(Counted { not_before: Instant::now() });
    let state = web::Data::from(Arc::new(State { store, metrics, keeper, scheduler, counted }));
    let server = HttpServer::new(move || {
        App::new()
            .app_data(state.clone())
            .route("/metrics", web::get().to(metrics_page))
            .route("/healthz", web::get().to(healthz))
            .route("/readyz", web::get().to(readyz))
    })
    .workers(1)
    .disable_signals()
    .shutdown_timeout(1)
    .bind(address)
    .map_err(|e| Error::io(format!("http {address}"), e))?;
    let address = server.addrs()[0];
    let server = server.run();
    let handle = server.handle();
    actix_rt::spawn(server);
    Ok(Server { address, handle })
}

async fn metrics_page(state: web::Data<State>) -> HttpResponse {
    if let Ok(mut counted) = state.counted.try_lock()
        && Instant::now() >= counted.not_before
    {
        let began = Instant::now();
        match state.store.counts().await {
            Ok(counts) => state.metrics.observe(&counts),
            Err(error) => tracing::warn!(%error, "jobs cannot be counted for /metrics"),
        }
        counted.not_before = Instant::now() + (began.elapsed() * COUNT_SHARE).max(COUNT_EVERY);
    }
    HttpResponse::Ok().content_type("text/plain; version=0.0.4").body(state.metrics.render())
}

/// The process answers.
async fn healthz() -> HttpResponse {
    HttpResponse::Ok().body("ok\n")
}

/// The node holds its lease, so it can take work; warns when history partitions run out.
async fn readyz(state: web::Data<State>) -> HttpResponse {
    let lease = state.keeper.send(Observe).await.map(|o| o.state).unwrap_or_default();
    if lease != "held" {
        return HttpResponse::ServiceUnavailable().body("no lease: the database is away or the node was too slow\n");
    }
    let days = state.scheduler.send(Observe).await.map(|o| o.load).unwrap_or_default();
    let warning =
        if days < 2 { format!("warning: history partitions for {days} days ahead only\n") } else { String::new() };
    HttpResponse::Ok().body(format!("ok\n{warning}"))
}
