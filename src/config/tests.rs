use proptest::prelude::*;

use super::*;

fn load(toml: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), toml).unwrap();
    let own = |list: &[(&str, &str)]| list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Vec<_>>();
    Config::load(Some(file.path()), own(env), own(flags))
}

#[test]
fn later_sources_win() {
    let toml = "lease = '10s'\ngrace = '5s'\nname = 'file'\n[queues.emails]\nslots = 100\n";
    let config = load(
        toml,
        &[("PGCUE_GRACE", "7s"), ("PGCUE_NAME", "env"), ("HOME", "/"), ("PGCUE_PORT", "tcp://10.0.0.1:9187")],
        &[("name", "flag")],
    )
    .unwrap();
    assert_eq!(config.lease, Duration::from_secs(10));
    assert_eq!(config.grace, Duration::from_secs(7));
    assert_eq!(config.name, "flag");
    assert_eq!(config.queues["emails"], QueueConfig { slots: 100, threads: 64 });
    assert!(!config.queues.contains_key("default"));
}

#[test]
fn every_fault_is_reported_with_key_value_and_fix() {
    let error =
        load("leese = '3s'\nlease = '-1s'\n[queues.a]\nslots = 0\n", &[("PGCUE_HTTP", "here")], &[]).unwrap_err();
    let text = error.to_string();
    for part in [
        "leese is \"3s\": unknown key; did you mean lease?",
        "lease is \"-1s\": give a time such as 30s or 5m, from 3s to 1h",
        "queues.a.slots is \"0\": give a whole number from 1 to 10000",
        "http is \"here\": give an address",
    ] {
        assert!(text.contains(part), "{part} not in:\n{text}");
    }
    assert_eq!(error.exit_code(), 64);
}

#[test]
fn malformed_toml_names_the_file_and_the_place() {
    let text = load("lease = ", &[], &[]).unwrap_err().to_string();
    assert!(text.starts_with("config is ") && text.contains("line 1"), "{text}");
}

/// Text as people and generators write it: near misses of what is allowed, and anything.
fn value() -> impl Strategy<Value = String> {
    let near =
        ["", "0", "-1", "true", "3s", "1h", "5 m", "99999999999999999999", "1e9", "NaN", "127.0.0.1:1", "\0", "info"];
    prop_oneof![prop::sample::select(near.to_vec()).prop_map(str::to_owned), "\\PC{0,20}", any::<String>()]
}

fn key() -> impl Strategy<Value = String> {
    let known = prop::sample::select(KEYS).prop_map(|key| key.replace('*', "emails"));
    prop_oneof![4 => known, 1 => "queues\\.\\PC{0,6}\\.(slots|threads)", 1 => "[a-z_.]{0,12}", 1 => any::<String>()]
}

/// Every key with values that it allows.
fn valid() -> impl Strategy<Value = BTreeMap<String, String>> {
    let pairs = KEYS.iter().map(|key| {
        let allowed = match *key {
            "migrate" | "listen" | "demo" | "log_json" => "true|false",
            "lease" | "grace" | "timeout" | "poll" | "sticky_idle" => "[3-9]s|[1-5][0-9]s|[3-9] seconds",
            "http" => "127\\.0\\.0\\.1:[1-9][0-9]{0,3}",
            "log" => "info|warn,pgcue=debug",
            "database_url" | "schema" | "name" => "[a-zA-Z0-9 äß\"'=#\\\\.]{1,20}",
            _ => "6[4-9]|[7-9][0-9]|100",
        };
        (Just(key.replace('*', "emails")), allowed)
    });
    let all: Vec<_> = pairs.collect();
    (all, prop::collection::vec(any::<bool>(), KEYS.len()))
        .prop_map(|(all, taken)| all.into_iter().zip(taken).filter(|(_, taken)| *taken).map(|(pair, _)| pair).collect())
}

proptest! {
    #[test]
    fn whatever_is_written_each_fault_names_its_key(pairs in prop::collection::vec((key(), value()), 0..8), as_flags: bool) {
        let written: BTreeMap<String, String> = pairs.into_iter().collect();
        let env = |key: &str| format!("PGCUE_{}", key.to_uppercase().replace('.', "__"));
        let loaded = match as_flags {
            true => Config::load(None, [], written.clone().into_iter().collect()),
            false => Config::load(None, written.iter().map(|(k, v)| (env(k), v.clone())), Vec::new()),
        };
        if let Err(error) = loaded {
            let Error::Config(faults) = &error else { panic!("{error}") };
            for fault in faults {
                let known = |key: &String| *key == fault.field || env(key).to_lowercase() == env(&fault.field).to_lowercase();
                prop_assert!(written.keys().any(known), "{fault} is none of {written:?}");
                prop_assert!(!fault.fix.is_empty());
            }
        }
    }

    #[test]
    fn any_file_is_read_or_refused(text in prop_oneof![any::<String>(), "([a-z_.\\[\\]]{1,9}( ?= ?('\\PC{0,5}'|[0-9.]{1,20}|\\[|\\{))?\n){0,6}"]) {
        if let Err(error) = load(&text, &[], &[]) {
            prop_assert_eq!(error.exit_code(), 64, "{}", error);
        }
    }

    #[test]
    fn file_environment_and_flags_say_the_same(written in valid()) {
        let toml: String = written.iter().map(|(k, v)| format!("{k} = {}\n", serde_json::to_string(v).unwrap())).collect();
        let env: Vec<_> = written.iter().map(|(k, v)| (format!("PGCUE_{}", k.to_uppercase().replace('.', "__")), v)).collect();
        let env: Vec<_> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let flags: Vec<_> = written.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let file = load(&toml, &[], &[]).unwrap();
        prop_assert_eq!(&file, &load("", &env, &[]).unwrap());
        prop_assert_eq!(&file, &load("", &[], &flags).unwrap());
        prop_assert_eq!(file.database_url, written.get("database_url").cloned());
    }

    #[test]
    fn durations_come_back_as_they_were_written(text: String, ms in 0u64..1 << 50) {
        let _ = duration(&text);
        prop_assert_eq!(duration(&format!("{ms}ms")), Some(Duration::from_millis(ms)));
        prop_assert_eq!(duration(&format!("-{}ms", ms + 1)), None);
    }
}
