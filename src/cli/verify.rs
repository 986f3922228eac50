//! `pgcue verify`: look for broken promises in the tables, and repair them.

use clap::Args;
use serde::Serialize;

use super::{Common, print_json, print_table};
use crate::error::{Error, Result, shorten};
use crate::store::{Offence, Store};

/// Exits with 1 if something is wrong. Safe while nodes run: it only reads, in one snapshot. It reads all
/// tables whole, so on a big history it may take a while.
#[derive(Args)]
pub(super) struct Verify {
    /// Repair what can be repaired, also safe while nodes run; what is left is found again
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    /// What was wrong and is repaired.
    repaired: Vec<Offence>,
    /// What is wrong.
    found: Vec<Offence>,
}

impl Verify {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let store = common.checked_client().await?.store().clone();
        let mut report = Report { repaired: Vec::new(), found: store.verify().await? };
        while self.repair && mend(&store, &mut report).await {
            report.found = store.verify().await?;
        }
        if self.json {
            print_json(&report)?;
        } else {
            report.print();
        }
        match report.found.len() {
            0 => Ok(()),
            n => Err(Error::Setup(format!("{n} offences are left in schema {}", store.schema()))),
        }
    }
}

/// Repair what was found; one repair may bring another offence to light. Never the same one twice, so that
/// this ends. False if there was nothing to do.
async fn mend(store: &Store, report: &mut Report) -> bool {
    let before = report.repaired.len();
    for offence in &report.found {
        if report.repaired.contains(offence) {
            continue;
        }
        match store.repair(offence).await {
            Ok(true) => report.repaired.push(offence.clone()),
            Ok(false) => {}
            Err(error) => eprintln!("pgcue: {} is not repaired: {error}", offence.rule), // it is found again
        }
    }
    report.repaired.len() > before
}

impl Report {
    fn print(&self) {
        let cells = |offence: &Offence, repair: String| {
            let number = |number: Option<i64>| number.map(|n| n.to_string()).unwrap_or_default();
            vec![
                offence.rule.clone(),
                offence.queue.clone().unwrap_or_default(),
                number(offence.job),
                shorten(offence.cursor_key.as_deref().unwrap_or_default(), 40),
                number(offence.token),
                offence.found.clone(),
                repair,
            ]
        };
        let done = |offence: &Offence| cells(offence, format!("done: {}", offence.repair.clone().unwrap_or_default()));
        let left =
            |offence: &Offence| cells(offence, offence.repair.clone().unwrap_or_else(|| "yours to decide".into()));
        let rows: Vec<_> = self.repaired.iter().map(done).chain(self.found.iter().map(left)).collect();
        match rows.is_empty() {
            true => println!("every promise is kept"),
            false => print_table(&["RULE", "QUEUE", "JOB", "CURSOR", "TOKEN", "FOUND", "REPAIR"], &rows),
        }
    }
}
