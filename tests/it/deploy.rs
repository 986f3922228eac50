//! What operators deploy must fit what a node does: the dashboard's metrics, the manifests' keys.

use std::collections::BTreeSet;
use std::path::Path;

use pgcue::{Config, NewJob, Node};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::database;

/// A page of the service port, with its status line.
pub async fn get(address: &str, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page.replacen("HTTP/1.0", "HTTP/1.1", 1)
}

fn metric_names(expression: &str) -> BTreeSet<String> {
    expression
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("pgcue_"))
        .map(|word| {
            ["_bucket", "_sum", "_count"]
                .iter()
                .fold(word, |word, end| word.strip_suffix(end).unwrap_or(word))
                .to_owned()
        })
        .collect()
}

#[actix::test]
async fn the_dashboard_shows_what_a_running_node_serves() {
    let db = database().await;
    let config = Config { demo: true, http: Some("127.0.0.1:0".into()), ..db.config() };
    let node = Node::new(config).await.unwrap().start().await.unwrap();
    let done = db.client.enqueue(NewJob::new("noop", "1")).await.unwrap().id;
    let panics = db.client.enqueue(NewJob::new("panic", "1").max_attempts(1)).await.unwrap().id;
    db.client.enqueue(NewJob::new("foreign", "1")).await.unwrap();
    db.reaches(done, "completed").await;
    db.reaches(panics, "failed").await;
    let address = node.http().unwrap().to_string();
    let mut served = BTreeSet::new();
    crate::support::eventually("slots are measured", std::time::Duration::from_secs(20), || async {
        get(&address, "/metrics").await.contains("pgcue_slots{")
    })
    .await;
    let page = get(&address, "/metrics").await;
    for line in page.lines().filter(|line| line.starts_with("pgcue_")) {
        served.extend(metric_names(line.split(['{', ' ']).next().unwrap()));
    }
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana/pgcue.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut expressions = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            expressions += 1;
            let names = metric_names(target["expr"].as_str().unwrap());
            assert!(
                !names.is_empty() && names.is_subset(&served),
                "{names:?} of {:?} is not in {served:?}",
                panel["title"]
            );
        }
    }
    assert!(expressions >= 10, "{expressions} expressions");
    node.drain().await.unwrap();
}

#[actix::test]
async fn the_manifests_configuration_is_valid() {
    let manifest = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes")).unwrap();
    let mut checked = 0;
    for file in manifest {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let Some((_, rest)) = text.split_once("pgcue.toml: |\n") else { continue };
        let indented = |line: &&str| line.trim().is_empty() || line.starts_with("    ");
        let toml: Vec<&str> = rest.lines().take_while(indented).map(str::trim).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), toml.join("\n")).unwrap();
        let config = Config::load(Some(file.path()), [], Vec::new()).unwrap();
        assert!(!config.migrate && config.http.is_some(), "{config:?}");
        checked += 1;
    }
    assert_eq!(checked, 1);
}
