//! Connections: TLS, keepalives, and errors in words that help.

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, PoolError, QueueMode, RecyclingMethod, Runtime};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Error, Fault, Result, with_causes};

/// How long the network may take to connect unless the URL says otherwise (`connect_timeout`).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long all of it may take: a server, or something on the way, that accepts and says nothing.
const SESSION_TIMEOUT: Duration = Duration::from_secs(10);

/// A database's address with pgcue's defaults filled in.
#[derive(Clone)]
pub struct Target {
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
}

impl Target {
    /// Read a URL or a key-value string, as libpq writes them.
    pub fn parse(url: &str) -> Result<Self> {
        let mut config: tokio_postgres::Config = url.parse().map_err(|e| {
            // The value may hold a password: it is not repeated.
            let fix = format!("{}; give postgres://user:password@host:port/database", with_causes(&e));
            Fault::new("database_url", "malformed", fix)
        })?;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_application_name().is_none() {
            config.application_name("pgcue");
        }
        // Of several hosts the primary is taken; a standby, or a primary that was set to read only, is refused.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        config.keepalives_idle(Duration::from_secs(10));
        config.keepalives_interval(Duration::from_secs(5));
        config.keepalives_retries(3);
        config.tcp_user_timeout(Duration::from_secs(30));
        let tls = tls(config.get_ssl_mode())?;
        Ok(Target { config, tls })
    }

    /// Set what `pg_stat_activity` shows, unless the URL names it.
    pub fn named(mut self, name: &str) -> Self {
        if self.config.get_application_name() == Some("pgcue") {
            self.config.application_name(name);
        }
        self
    }

    /// A pool of at most `size` connections, which live on the runtime that this is called on, if on one.
    pub fn pool(&self, size: usize) -> Pool {
        // No session state is kept between calls, so a connection is clean when it comes back.
        let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let home = Home { tls: self.tls.clone(), runtime: Handle::try_current().ok() };
        let manager = Manager::from_connect(self.config.clone(), home, manager);
        Pool::builder(manager)
            .max_size(size)
            .queue_mode(QueueMode::Lifo) // the one used last has its plans at hand
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(30)))
            .create_timeout(Some(SESSION_TIMEOUT))
            .build()
            .expect("a pool with a runtime for its timeouts can be built")
    }

    /// One connection of its own, and the future that drives it.
    pub async fn connect(
        &self,
    ) -> Result<(
        tokio_postgres::Client,
        tokio_postgres::Connection<
            tokio_postgres::Socket,
            <MakeRustlsConnect as tokio_postgres::tls::MakeTlsConnect<tokio_postgres::Socket>>::Stream,
        >,
    )> {
        let connect = self.config.connect(self.tls.clone());
        let connected = tokio::time::timeout(SESSION_TIMEOUT, connect).await;
        connected.map_err(|_| Error::Deadline(SESSION_TIMEOUT))?.map_err(|e| self.explain(&e))
    }

    /// Ask the server to stop what a session does; it need not answer.
    pub fn cancel(&self, token: tokio_postgres::CancelToken) {
        let tls = self.tls.clone();
        tokio::spawn(async move { drop(tokio::time::timeout(CONNECT_TIMEOUT, token.cancel_query(tls)).await) });
    }

    /// A failed connection as pgcue's error.
    pub fn explain(&self, error: &tokio_postgres::Error) -> Error {
        let io = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
        if io.is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied && e.to_string().contains("writes")) {
            return Error::ReadOnly; // as the driver says that the session is not read-write
        }
        let reason = match error.as_db_error() {
            Some(db) => db.message().to_owned(),
            None => with_causes(error),
        };
        Error::Connect { target: self.to_string(), reason }
    }

    /// A failed checkout from the pool as pgcue's error.
    pub fn explain_pool(&self, error: PoolError) -> Error {
        match error {
            PoolError::Backend(e) => self.explain(&e),
            other => Error::Connect { target: self.to_string(), reason: with_causes(&other) },
        }
    }
}

/// Makes a pool's connections, all on one runtime. Handlers enqueue over the same pool: a connection that
/// lived on the thread of one that blocks it would be dead for everybody.
struct Home {
    tls: MakeRustlsConnect,
    runtime: Option<Handle>,
}

impl Connect for Home {
    fn connect(
        &self,
        config: &tokio_postgres::Config,
    ) -> BoxFuture<'_, Result<(tokio_postgres::Client, JoinHandle<()>), tokio_postgres::Error>> {
        let connect = open(config.clone(), self.tls.clone());
        let Some(runtime) = self.runtime.clone() else { return connect.boxed() };
        let (config, tls) = (config.clone(), self.tls.clone());
        async move {
            // Dropped, it ends: whoever waits no longer leaves no half-made connection.
            match AbortOnDropHandle::new(runtime.spawn(connect)).await {
                Ok(made) => made,
                // That runtime has ended; this one has not.
                Err(_) => open(config, tls).await,
            }
        }
        .boxed()
    }
}

/// Connect, and drive the connection on this runtime.
async fn open(
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
) -> Result<(tokio_postgres::Client, JoinHandle<()>), tokio_postgres::Error> {
    let (client, connection) = config.connect(tls).await?;
    // Why it ended is told to whoever waits for an answer.
    Ok((client, tokio::spawn(async move { drop(connection.await) })))
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => "localhost".into(),
        };
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        write!(f, "{host}:{port}/{}", self.config.get_dbname().or(self.config.get_user()).unwrap_or("?"))
    }
}

/// TLS as the URL's `sslmode` says. `require`: the server's certificate is verified against the system's.
/// `prefer`, the default: encrypted if the server can, whoever it is, as libpq does it; a server with the
/// self-signed certificate that distributions give it must work without configuration.
fn tls(mode: SslMode) -> Result<MakeRustlsConnect> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Setup(format!("tls: {e}")))?;
    let config = if mode == SslMode::Prefer {
        config.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
    } else {
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        config.with_root_certificates(roots)
    };
    Ok(MakeRustlsConnect::new(config.with_no_client_auth()))
}

/// Accepts every certificate, and checks only that the server has its key.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_address_is_read_or_refused_without_being_repeated(
            text in prop_oneof![any::<String>(), "postgres(ql)?://\\PC{0,30}", "([a-z_]{1,9} ?= ?'?\\PC{0,6}'? ){0,5}"],
            secret in "[a-zA-Z]{12}",
        ) {
            for url in [text.clone(), format!("postgres://u:{secret}@{text}"), format!("password={secret} {text}")] {
                match Target::parse(&url) {
                    Ok(target) => prop_assert!(!target.to_string().is_empty()),
                    Err(error) => {
                        let error = error.to_string();
                        prop_assert!(error.starts_with("database_url is malformed: "), "{}", error);
                        prop_assert!(!error.contains(&secret), "{}", error);
                    }
                }
            }
        }
    }
}
