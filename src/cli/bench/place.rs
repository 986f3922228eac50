//! Where a bench happens: a schema of its own, on a private server or on one that is given.

use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::cli::Common;
use crate::dev::PrivateServer;
use crate::error::{Error, Fault, Result};
use crate::store::{Store, Target, quote};

/// The comment by which bench knows its own schema again.
const MARK: &str = "pgcue bench";
const SCHEMA: &str = "pgcue_bench";
const SETTINGS: &[&str] =
    &["shared_buffers = 1GB", "max_wal_size = 4GB", "checkpoint_timeout = 30min", "max_connections = 200"];
/// The settings that a figure cannot be read without.
const TOLD: &str = "array['fsync', 'synchronous_commit', 'full_page_writes', 'wal_level', 'shared_buffers', \
    'max_wal_size', 'checkpoint_timeout', 'autovacuum']";

pub(super) struct Place {
    pub(super) url: String,
    pub(super) schema: String,
    /// The session that loads, measures and cleans up.
    pub(super) sql: Client,
    /// What `pg_stat_activity` calls the sessions of this bench begins with this.
    pub(super) name: String,
    /// Whether finished jobs are kept.
    pub(super) history: bool,
    server: Option<PrivateServer>,
}

impl Place {
    /// Start the server if none is given, and make sure that the schema may be used.
    pub(super) async fn open(common: &Common, history: bool) -> Result<Self> {
        let config = common.config(None, Vec::new())?;
        let schema = common.schema.clone().unwrap_or_else(|| SCHEMA.into());
        let server = match &config.database_url {
            Some(_) => None,
            None => {
                eprintln!("starting a private PostgreSQL (nothing is kept)");
                Some(PrivateServer::start(None, SETTINGS)?)
            }
        };
        let url = match &server {
            Some(server) => server.url("postgres"),
            None => config.database_url()?.to_owned(),
        };
        let name = format!("{MARK} {}", std::process::id());
        let sql = connect(&url, &name, &schema).await?;
        let place = Place { url, schema, sql, name, history, server };
        place.claim().await?;
        Ok(place)
    }

    /// Refuse a schema that bench did not make, or that another bench is using.
    async fn claim(&self) -> Result<()> {
        let comment = "select obj_description(n.oid, 'pg_namespace') from pg_namespace n where n.nspname = $1";
        let found = self.sql.query_typed(comment, &[(&self.schema, Type::TEXT)]).await?;
        let refuse = |fix: &str| Err(Fault::new("schema", format!("{:?}", self.schema), fix).into());
        if found.first().is_some_and(|row| row.get::<_, Option<&str>>(0) != Some(MARK)) {
            return refuse("it is there already, and bench did not make it; give a name that is free");
        }
        let lock = "select pg_try_advisory_lock(hashtext('pgcue bench'), hashtext($1))";
        if !self.sql.query_typed(lock, &[(&self.schema, Type::TEXT)]).await?[0].get::<_, bool>(0) {
            return refuse("another pgcue bench is using it; give another name, or wait");
        }
        Ok(())
    }

    /// A new schema, with nothing in it but pgcue's tables.
    pub(super) async fn fresh(&self) -> Result<()> {
        self.drop_schema().await?;
        let schema = quote(&self.schema);
        self.sql
            .batch_execute(&format!("begin; create schema {schema}; comment on schema {schema} is '{MARK}'; commit"))
            .await?;
        self.store()?.migrate().await?;
        if !self.history {
            self.sql.query_typed("select keep_history('default', false)", &[]).await?;
        }
        Ok(())
    }

    async fn drop_schema(&self) -> Result<()> {
        let drop = format!("set client_min_messages = warning; drop schema if exists {} cascade", quote(&self.schema));
        Ok(self.sql.batch_execute(&drop).await?)
    }

    fn store(&self) -> Result<Store> {
        Ok(Store::new(Target::parse(&self.url)?.named(&self.name), &self.schema, 1))
    }

    /// Another session that works in the schema.
    pub(super) async fn session(&self) -> Result<Client> {
        connect(&self.url, &self.name, &self.schema).await
    }

    /// Fails if the tables say that a promise was broken.
    pub(super) async fn verify(&self) -> Result<()> {
        match self.store()?.verify().await?.as_slice() {
            [] => Ok(()),
            [first, ..] => Err(Error::Setup(format!("the tables are not sound: {}: {}", first.rule, first.found))),
        }
    }

    /// The process id of the server's first process, if the server is ours.
    pub(super) fn postmaster(&self) -> Option<u32> {
        let file = self.server.as_ref()?.data().join("postmaster.pid");
        std::fs::read_to_string(file).ok()?.lines().next()?.trim().parse().ok()
    }

    /// The server's version and settings.
    pub(super) async fn describe(&self) -> Result<Value> {
        let settings = format!(
            "select current_setting('server_version'), json_object_agg(s, current_setting(s, true))::text from unnest({TOLD}) s"
        );
        let row = &self.sql.query_typed(&settings, &[]).await?[0];
        let (version, settings): (String, String) = (row.get(0), row.get(1));
        let settings: Value = serde_json::from_str(&settings)?;
        Ok(json!({"server_version": version, "private_server": self.server.is_some(), "settings": settings}))
    }

    /// End what is left of this bench, and drop the schema.
    pub(super) async fn close(self) -> Result<()> {
        let end = "select pg_terminate_backend(a.pid, 5000) from pg_stat_activity a \
            where a.usename = current_user and a.pid <> pg_backend_pid() \
              and (a.application_name = $1 or a.application_name like 'pgcue ' || $1 || ' %')";
        self.sql.query_typed(end, &[(&self.name, Type::TEXT)]).await?;
        self.drop_schema().await
    }
}

async fn connect(url: &str, name: &str, schema: &str) -> Result<Client> {
    let (client, connection) = Target::parse(url)?.connect().await?;
    tokio::spawn(async move { drop(connection.await) });
    let set = format!("set search_path = {}; set application_name = '{name}'", quote(schema));
    client.batch_execute(&set).await?;
    Ok(client)
}
