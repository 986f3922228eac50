//! Producers: they enqueue in every way there is, and record what they know of each job.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use pgcue::record::{Event, Fate, Recorder};
use pgcue::store::{Store, Target};
use pgcue::{Client, Error, NewJob, Task};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;

use crate::node::{Act, Args, Step, Work};

/// What the producers do.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    pub producers: u64,
    /// Between two calls of one producer.
    pub pause: Duration,
    /// At most so many jobs a call.
    pub batch: usize,
    /// So many cursors for each producer.
    pub cursors: u64,
    /// A job takes up to so many milliseconds.
    pub ms: u64,
    /// The share of jobs that fail at their first attempt.
    pub failing: f64,
    /// The share of calls that are followed by a cancel of one of their jobs.
    pub cancelling: f64,
}

impl Default for Habits {
    fn default() -> Self {
        Habits {
            producers: 4,
            pause: Duration::from_millis(20),
            batch: 20,
            cursors: 5,
            ms: 4,
            failing: 0.05,
            cancelling: 0.05,
        }
    }
}

/// Producers at work.
pub struct Load {
    stop: Rc<Cell<bool>>,
    counts: Rc<RefCell<Counts>>,
    producers: Vec<JoinHandle<()>>,
}

/// How many jobs met which fate.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub committed: u64,
    pub rolled_back: u64,
    pub unknown: u64,
    pub cancelled: u64,
}

impl Load {
    pub fn start(url: &str, recorder: &Recorder, seed: u64, habits: Habits) -> Self {
        let (stop, counts) = (Rc::default(), Rc::default());
        let producers = (0..habits.producers)
            .map(|number| {
                let store = Store::new(Target::parse(url).unwrap().named("producer"), "pgcue", 2);
                let producer = Producer {
                    number,
                    client: Client::new(store, 1 << 20),
                    recorder: recorder.clone(),
                    random: StdRng::seed_from_u64(seed ^ number),
                    habits,
                    next: 0,
                    stop: Rc::clone(&stop),
                    counts: Rc::clone(&counts),
                };
                actix_rt::spawn(producer.run())
            })
            .collect();
        Load { stop, counts, producers }
    }

    /// What was enqueued so far.
    pub fn counts(&self) -> Counts {
        *self.counts.borrow()
    }

    /// Let the producers finish what they are at.
    pub async fn stop(self) -> Counts {
        self.stop.set(true);
        for producer in self.producers {
            producer.await.unwrap();
        }
        *self.counts.borrow()
    }
}

struct Producer {
    number: u64,
    client: Client,
    recorder: Recorder,
    random: StdRng,
    habits: Habits,
    next: u64,
    stop: Rc<Cell<bool>>,
    counts: Rc<RefCell<Counts>>,
}

/// How a call went.
enum Called {
    /// With the ids that it told.
    Committed(Vec<i64>),
    RolledBack,
    Failed(Error),
}

impl Producer {
    async fn run(mut self) {
        while !self.stop.get() {
            let cursor = self.random.random_bool(0.4).then(|| self.random.random_range(0..self.habits.cursors));
            let jobs: Vec<(String, NewJob)> =
                (0..self.random.random_range(1..=self.habits.batch)).map(|_| self.job(cursor)).collect();
            let (keys, jobs): (Vec<String>, Vec<NewJob>) = jobs.into_iter().unzip();
            let called = match self.call(jobs).await {
                Ok(called) => called,
                Err(error) => Called::Failed(error),
            };
            let fate = match &called {
                Called::Committed(_) => Fate::Committed,
                Called::RolledBack => Fate::RolledBack,
                Called::Failed(error) if is_refusal(error) => Fate::RolledBack,
                Called::Failed(_) => Fate::Unknown,
            };
            self.count(fate, keys.len() as u64);
            for key in keys {
                self.recorder.write(Event::Enqueued { key, fate }).unwrap();
            }
            match called {
                Called::Committed(ids) if !ids.is_empty() && self.random.random_bool(self.habits.cancelling) => {
                    let one = self.random.random_range(0..ids.len());
                    self.cancel(ids[one]).await;
                }
                Called::Failed(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                _ => {}
            }
            tokio::time::sleep(self.habits.pause).await;
        }
    }

    fn job(&mut self, cursor: Option<u64>) -> (String, NewJob) {
        self.next += 1;
        let key = format!("{}-{}", self.number, self.next);
        let act = if self.random.random_bool(self.habits.failing) { Act::Fail } else { Act::Complete };
        let args = Args { key: key.clone(), ms: self.random.random_range(0..=self.habits.ms), act };
        let job = match cursor {
            Some(cursor) => Step(args).job().cursor(format!("{}.{cursor}", self.number)),
            None => {
                let job = Work(args).job().priority(self.random.random_range(-1..=1));
                match self.random.random_range(0..20) {
                    0 => job.delay(Duration::from_millis(self.random.random_range(1..500))),
                    _ => job,
                }
            }
        };
        (key, job)
    }

    /// Enqueue in one of the ways that there are.
    async fn call(&mut self, jobs: Vec<NewJob>) -> Result<Called, Error> {
        let way = self.random.random_range(0..10);
        if way < 6 {
            let enqueued = self.client.enqueue_many(jobs).await?;
            return Ok(Called::Committed(enqueued.iter().map(|enqueued| enqueued.id).collect()));
        }
        let mut connection = self.client.store().connection().await?;
        let tx = connection.transaction().await?;
        let within = self.client.within(&tx);
        if way == 6 {
            within.copy(jobs.into_iter().map(Ok)).await?;
        } else {
            within.enqueue_many(jobs).await?;
        }
        match way {
            7 => {
                tx.rollback().await?;
                Ok(Called::RolledBack)
            }
            8 => {
                // The transaction's other work fails.
                let error = tx.batch_execute("select 1 / 0").await.unwrap_err();
                Err(error.into())
            }
            _ => {
                tx.commit().await?;
                Ok(Called::Committed(Vec::new()))
            }
        }
    }

    async fn cancel(&self, job: i64) {
        let answer = match self.client.store().cancel(job).await {
            Ok(Some(answer)) => answer,
            Ok(None) => return, // it has finished
            Err(_) => "unknown".into(),
        };
        self.counts.borrow_mut().cancelled += 1;
        self.recorder.write(Event::Cancelled { job, answer }).unwrap();
    }

    fn count(&self, fate: Fate, jobs: u64) {
        let mut counts = self.counts.borrow_mut();
        match fate {
            Fate::Committed => counts.committed += jobs,
            Fate::RolledBack => counts.rolled_back += jobs,
            Fate::Unknown => counts.unknown += jobs,
        }
    }
}

/// The database said no: nothing was committed. A session that was ended, or a server that fails, may have
/// committed before.
fn is_refusal(error: &Error) -> bool {
    match error {
        Error::Database(e) => {
            e.code().is_some_and(|code| !["57", "08", "58", "XX"].iter().any(|c| code.code().starts_with(c)))
        }
        Error::Invalid(_) => true,
        _ => false,
    }
}
