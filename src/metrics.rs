//! Every metric of a node, named in one place. Times in seconds; no label ever holds a cursor's key.

use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::store::LiveCount;

/// The metrics of one node, with their own registry.
#[derive(Clone)]
#[allow(missing_docs)]
pub struct Metrics {
    registry: Registry,
    /// Live jobs by queue and state, as the database has them: the same on every node.
    pub jobs: IntGaugeVec,
    pub oldest: GaugeVec,
    pub claimed: IntCounterVec,
    pub finished: IntCounterVec,
    pub wait: HistogramVec,
    pub run: HistogramVec,
    pub claim_size: HistogramVec,
    pub settle_size: HistogramVec,
    pub slots: IntGaugeVec,
    pub rebuilt: IntCounterVec,
    pub leases_lost: IntCounter,
    pub settles_refused: IntCounter,
    pub reaped: IntCounter,
    pub wakeups: IntCounterVec,
    pub reconnects: IntCounter,
}

const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0];
const SIZES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0];

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric.expect("metric names and labels are valid");
                registry.register(Box::new(metric.clone())).expect("metric names are unique");
                metric
            }};
        }
        let histogram =
            |name: &str, help: &str, buckets: &[f64]| HistogramOpts::new(name, help).buckets(buckets.to_vec());
        Metrics {
            jobs: register!(IntGaugeVec::new(
                Opts::new("pgcue_jobs", "Live jobs by queue and state, cluster-wide."),
                &["queue", "state"]
            )),
            oldest: register!(GaugeVec::new(
                Opts::new("pgcue_oldest_ready_seconds", "How long the oldest ready job has been due, cluster-wide."),
                &["queue"]
            )),
            claimed: register!(IntCounterVec::new(
                Opts::new("pgcue_claimed_total", "Jobs claimed by this node."),
                &["queue"]
            )),
            finished: register!(IntCounterVec::new(
                Opts::new("pgcue_attempts_total", "Attempts settled by this node, by outcome."),
                &["queue", "kind", "outcome"]
            )),
            wait: register!(HistogramVec::new(
                histogram("pgcue_wait_seconds", "From when a job could run to its claim.", SECONDS),
                &["queue"]
            )),
            run: register!(HistogramVec::new(
                histogram("pgcue_run_seconds", "How long attempts ran.", SECONDS),
                &["queue", "kind"]
            )),
            claim_size: register!(HistogramVec::new(
                histogram("pgcue_claim_jobs", "Jobs per claim.", SIZES),
                &["queue"]
            )),
            settle_size: register!(HistogramVec::new(
                histogram("pgcue_settle_jobs", "Attempts per settle.", SIZES),
                &[]
            )),
            slots: register!(IntGaugeVec::new(
                Opts::new("pgcue_slots", "Slots of this node by use: busy or free."),
                &["queue", "use"]
            )),
            rebuilt: register!(IntCounterVec::new(
                Opts::new("pgcue_slots_rebuilt_total", "Handlers rebuilt from their factory, by cause."),
                &["queue", "cause"]
            )),
            leases_lost: register!(IntCounter::new("pgcue_leases_lost_total", "Times that this node lost its lease.")),
            settles_refused: register!(IntCounter::new(
                "pgcue_settles_refused_total",
                "Attempts whose settle was refused: their claim was no longer valid."
            )),
            reaped: register!(IntCounter::new(
                "pgcue_reaped_jobs_total",
                "Jobs that this node took back from ended leases."
            )),
            wakeups: register!(IntCounterVec::new(
                Opts::new("pgcue_wakeups_total", "Wake-ups of idle queues, by cause."),
                &["queue", "cause"]
            )),
            reconnects: register!(IntCounter::new("pgcue_reconnects_total", "Connections of the listener that broke.")),
            registry,
        }
    }
}

impl Metrics {
    /// Take over what the database counts.
    pub fn observe(&self, counts: &[LiveCount]) {
        self.jobs.reset();
        self.oldest.reset();
        for count in counts {
            self.jobs.with_label_values(&[&count.queue, &count.state]).set(count.jobs);
            if count.state == "ready" {
                self.oldest.with_label_values(&[&count.queue]).set(count.oldest_seconds);
            }
        }
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be written");
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}
