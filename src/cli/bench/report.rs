//! What a bench found, as a table or as JSON.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Options;
use super::measure::fields;
use crate::cli::{print_json, print_table};
use crate::error::Result;

/// What a subcommand found.
pub(super) struct Found {
    /// The subcommand, and what it was asked.
    pub(super) bench: &'static str,
    pub(super) asked: Value,
    /// One figure or more of each round, all with the same names.
    pub(super) rounds: Vec<Map<String, Value>>,
    /// What is listed: its name, and rows with the same fields.
    pub(super) list: Option<(&'static str, Vec<Value>)>,
}

/// What is not a figure.
const ABOUT: &[&str] = &["bench", "options", "pgcue", "private_server", "server_version", "settings"];

pub(super) struct Report(Map<String, Value>);

impl Report {
    pub(super) fn new(found: Found, server: Value, options: &Options) -> Self {
        let mut asked = fields(found.asked);
        asked.extend(fields(json!(options)));
        let mut all = fields(json!({"bench": found.bench, "options": asked, "pgcue": env!("CARGO_PKG_VERSION")}));
        all.extend(fields(server));
        let rounds: Vec<Value> = found.rounds.into_iter().map(Value::Object).collect();
        all.extend(fields(median(&rounds)));
        if rounds.len() > 1 {
            all.insert("rounds".into(), rounds.into());
        }
        all.extend(found.list.map(|(name, rows)| (name.to_owned(), rows.into())));
        Report(all)
    }

    pub(super) fn print(&self, json: bool) -> Result<()> {
        if json {
            return print_json(&self.0);
        }
        let mut lines = Vec::new();
        // The figures first.
        let (about, figures): (Vec<_>, Vec<_>) = self.0.iter().partition(|(name, _)| ABOUT.contains(&name.as_str()));
        figures
            .into_iter()
            .filter(|(_, value)| !value.is_array())
            .for_each(|(name, value)| flatten(name, value, &mut lines));
        for (name, value) in about {
            let mut parts = Vec::new();
            flatten("", value, &mut parts);
            let parts: Vec<String> = parts.into_iter().map(|(name, value)| format!("{name} {value}")).collect();
            lines.push((name.replace('_', " "), parts.join(", ").trim().to_owned()));
        }
        let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        lines.iter().for_each(|(name, value)| println!("{name:width$}  {value}"));
        for (name, rows) in self.0.iter().filter_map(|(name, value)| Some((name, value.as_array()?))) {
            println!("\n{name}");
            table(rows);
        }
        Ok(())
    }
}

/// The median of each number, by its name.
fn median(rounds: &[Value]) -> Value {
    match rounds {
        [] => Value::Null,
        [one] => one.clone(),
        [Value::Object(first), ..] => {
            let of = |name: &String| median(&rounds.iter().map(|round| round[name].clone()).collect::<Vec<_>>());
            first.keys().map(|name| (name.clone(), of(name))).collect()
        }
        _ => {
            let mut numbers: Vec<f64> = rounds.iter().filter_map(Value::as_f64).collect();
            numbers.sort_by(f64::total_cmp);
            match numbers.len() {
                0 => Value::Null,
                n if rounds.iter().all(|round| !round.is_f64()) => json!(numbers[n / 2] as i64),
                n => json!((numbers[(n - 1) / 2] + numbers[n / 2]) / 2.0),
            }
        }
    }
}

/// The numbers and texts of a value, each with its full name.
fn flatten(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(field, value)| flatten(format!("{name} {field}").trim(), value, lines));
        }
        _ => lines.push((name.replace('_', " "), cell(value))),
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            let number = number.as_f64().unwrap_or_default();
            let digits = if number.abs() >= 100.0 { 0 } else { 3 };
            format!("{number:.digits$}")
        }
        other => other.to_string(),
    }
}

fn table(rows: &[Value]) {
    let flat: Vec<Vec<(String, String)>> = rows
        .iter()
        .map(|row| {
            let mut lines = Vec::new();
            row.as_object().into_iter().flatten().for_each(|(name, value)| flatten(name, value, &mut lines));
            lines.sort_by_key(|(name, _)| name != "second"); // what the others are over
            lines
        })
        .collect();
    let headings: Vec<&str> = flat.first().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    let rows: Vec<Vec<String>> = flat.iter().map(|row| row.iter().map(|(_, cell)| cell.clone()).collect()).collect();
    print_table(&headings, &rows);
}

/// The options of a subcommand, as they are reported.
pub(super) fn asked(options: &impl Serialize) -> Value {
    json!(options)
}
