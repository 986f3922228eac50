//! The log of a node: lines on standard error, as text or as JSON.
//!
//! Every attempt has a span, whose fields are written out for lines that may follow; mostly none does. So the common
//! fields, integers and simple strings, are written here in one go; all others by `tracing_subscriber`, in the same form.

use std::fmt::{self, Debug, Write};
use std::io::IsTerminal;

use tracing::field::{Field, Visit};
use tracing::span::Record;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{DefaultFields, JsonFields, Writer};
use tracing_subscriber::fmt::{FormatFields, FormattedFields, MakeWriter};

use crate::config::Config;

/// Log as the configuration says.
pub(super) fn start(config: &Config, to: impl for<'a> MakeWriter<'a> + Send + Sync + 'static) {
    let log = tracing_subscriber::fmt().with_env_filter(&config.log).with_writer(to);
    if config.log_json {
        log.json().fmt_fields(Fields { style: &JSON, others: JsonFields::new() }).init();
    } else if std::io::stderr().is_terminal() {
        log.init();
    } else {
        log.with_ansi(false).fmt_fields(Fields { style: &TEXT, others: DefaultFields::new() }).init();
    }
}

/// What stands around names and values.
struct Style {
    begin: &'static str,
    name: (&'static str, &'static str),
    between: &'static str,
    end: &'static str,
}

const TEXT: Style = Style { begin: "", name: ("", "="), between: " ", end: "" };
const JSON: Style = Style { begin: "{", name: ("\"", "\":"), between: ",", end: "}" };

/// Writes fields: those of an attempt here, the `others` as the library does.
struct Fields<F> {
    style: &'static Style,
    others: F,
}

impl<'w, F> FormatFields<'w> for Fields<F>
where
    F: for<'a> FormatFields<'a> + 'static,
{
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut simple = Simple { style: self.style, text: String::with_capacity(128), simple: true };
        simple.text.push_str(self.style.begin);
        fields.record(&mut simple);
        if simple.simple {
            simple.text.push_str(self.style.end);
            writer.write_str(&simple.text)
        } else {
            self.others.format_fields(writer, fields)
        }
    }

    fn add_fields(&self, current: &'w mut FormattedFields<Self>, fields: &Record<'_>) -> fmt::Result {
        let mut theirs = FormattedFields::new(std::mem::take(&mut current.fields));
        let added = self.others.add_fields(&mut theirs, fields);
        current.fields = theirs.fields;
        added
    }
}

/// The fields so far, as long as all are simple.
struct Simple {
    style: &'static Style,
    text: String,
    simple: bool,
}

impl Simple {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let (before, after) = self.style.name;
        if self.text.len() > self.style.begin.len() {
            self.text.push_str(self.style.between);
        }
        self.text.push_str(before);
        self.text.push_str(field.name());
        self.text.push_str(after);
        let _ = self.text.write_fmt(value); // a String takes all
    }
}

impl Visit for Simple {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, format_args!("{value}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        // Nothing in it that either form would escape.
        if field.name() != "message" && value.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\') {
            self.put(field, format_args!("\"{value}\""));
        } else {
            self.simple = false;
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {
        self.simple = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::{fmt::layer, registry};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(subscriber: impl tracing::Subscriber + Send + Sync, lines: &Lines) -> String {
        tracing::subscriber::with_default(subscriber, || {
            let kind = "send_email";
            let job = tracing::info_span!("job", id = -7i64, kind, attempt = 3u16, more = tracing::field::Empty);
            job.in_scope(|| tracing::info!(n = 1, "plain"));
            job.record("more", "a \"quoted\" one");
            job.in_scope(|| tracing::warn!(error = %"not\nsimple", large = 1u64 << 63, "found {}", "it"));
            for kind in ["", "two words", "b\\s", "größer", "\u{1b}[31mred"] {
                tracing::info_span!("other", kind, half = 0.5).in_scope(|| tracing::info!(kind, "again"));
                tracing::info_span!("other", kind).in_scope(|| tracing::info!(kind));
            }
        });
        String::from_utf8(std::mem::take(&mut *lines.0.lock().unwrap())).unwrap()
    }

    #[test]
    fn lines_are_as_the_library_writes_them() {
        let lines = Lines::default();
        let to = lines.clone();
        let writer = move || to.clone();
        let text = || layer().without_time().with_ansi(false).with_writer(writer.clone());
        let json = || layer().json().without_time().with_writer(writer.clone());
        let ours = Fields { style: &TEXT, others: DefaultFields::new() };
        let expected = logged(registry().with(text()), &lines);
        assert_eq!(logged(registry().with(text().fmt_fields(ours)), &lines), expected);
        assert!(expected.contains("job{id=-7 kind=\"send_email\" attempt=3}: "), "{expected}");

        let ours = Fields { style: &JSON, others: JsonFields::new() };
        let expected = logged(registry().with(json()), &lines);
        let values = |text: String| text.lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<Value>>();
        assert_eq!(values(logged(registry().with(json().fmt_fields(ours)), &lines)), values(expected));
    }
}
