//! A private PostgreSQL server for `pgcue dev`, tests and examples.
//!
//! It listens on loopback only, behind a password of its own, and never outlives the program that
//! started it: a guard process waits on a pipe from here and stops the server when the pipe closes,
//! however this process ends. PostgreSQL refuses to run as root; then the server runs as `postgres`
//! or `nobody`.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::error::{Error, Result};

/// Where distributions put the server's programs; `*` is a version, the newest is taken.
const PLACES: &[&str] = &[
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/lib64/pgsql*/bin",
    "/usr/local/pgsql*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
];

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct PrivateServer {
    bin: PathBuf,
    data: PathBuf,
    port: u16,
    password: String,
    user: Option<Account>,
    guard: Child,
    _ephemeral: Option<tempfile::TempDir>,
}

/// The account that the server runs under when we are root.
#[derive(Debug, Clone, Copy)]
struct Account {
    uid: u32,
    gid: u32,
}

impl PrivateServer {
    /// Start a server whose data live in `data`, made if it is not there; without, in a directory that
    /// goes with the server. `settings` are lines of its configuration file, such as `fsync = off`.
    pub fn start(data: Option<&Path>, settings: &[&str]) -> Result<Self> {
        let bin = find_programs()?;
        let user = rustix::process::geteuid().is_root().then(unprivileged).transpose()?;
        let ephemeral = match data {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new().prefix("pgcue-").tempdir().map_err(|e| Error::io("temporary directory", e))?,
            ),
        };
        let home = data.map_or_else(|| ephemeral.as_ref().expect("one of both").path().to_owned(), Path::to_owned);
        std::fs::create_dir_all(&home).map_err(|e| Error::io(home.display().to_string(), e))?;
        let home = home.canonicalize().map_err(|e| Error::io(home.display().to_string(), e))?;
        give_to(&home, user)?;
        let data = home.join("data");
        let port = free_port()?;
        let mut server = PrivateServer {
            bin,
            data,
            port,
            password: String::new(),
            user,
            guard: Command::new("true").spawn().map_err(|e| Error::io("true", e))?,
            _ephemeral: ephemeral,
        };
        server.password = server.initialize(&home)?;
        server.launch(&home, settings)?;
        Ok(server)
    }

    /// The address of a database on it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://pgcue:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Run one of the server's programs as the server's user.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        command.current_dir("/").stdin(Stdio::null()).env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        if let Some(Account { uid, gid }) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Where its data are; its log and its password are beside them.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `pg_ctl` on this server: `restart -m immediate`, `stop -m fast`, `start`.
    pub fn control(&self, arguments: &[&str]) -> Result<()> {
        let log = self.data.with_file_name("log");
        let mut command = self.program("pg_ctl");
        command.arg("-D").arg(&self.data).arg("-l").arg(&log).arg("-w").args(arguments);
        let output =
            command.stdout(Stdio::null()).stderr(Stdio::piped()).output().map_err(|e| Error::io("pg_ctl", e))?;
        if output.status.success() {
            return Ok(());
        }
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(5).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        Err(Error::Setup(format!(
            "pg_ctl {}: {}\n{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim(),
            tail.join("\n")
        )))
    }

    /// Make the data directory unless it is there. Returns the password, which is kept beside it.
    fn initialize(&self, home: &Path) -> Result<String> {
        let secret = home.join("password");
        let io = |e| Error::io(secret.display().to_string(), e);
        if self.data.join("PG_VERSION").exists() {
            return Ok(std::fs::read_to_string(&secret).map_err(io)?.trim().to_owned());
        }
        let password: String = (0..24).map(|_| char::from(rand::random_range(b'a'..=b'z'))).collect();
        let mut file = std::fs::File::create(&secret).map_err(io)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(io)?;
        writeln!(file, "{password}").map_err(io)?;
        give_to(&secret, self.user)?;
        let mut initdb = self.program("initdb");
        initdb.arg("-D").arg(&self.data).arg(format!("--pwfile={}", secret.display()));
        initdb.args(["-U", "pgcue", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync"]);
        let output = initdb.output().map_err(|e| Error::io(self.bin.join("initdb").display().to_string(), e))?;
        if !output.status.success() {
            return Err(Error::Setup(format!(
                "initdb in {}: {}",
                home.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        Ok(password)
    }

    fn launch(&mut self, home: &Path, settings: &[&str]) -> Result<()> {
        let mut lines = format!(
            "port = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nmax_connections = 200\nshared_buffers = 256MB\n",
            self.port
        );
        for setting in settings {
            lines += &format!("{setting}\n");
        }
        let file = self.data.join("postgresql.conf");
        std::fs::write(&file, lines).map_err(|e| Error::io(file.display().to_string(), e))?;
        self.control(&["start"])?;
        let remove = if self._ephemeral.is_some() { format!("rm -rf '{}'", home.display()) } else { ":".into() };
        let stop = format!(
            "cat >/dev/null; '{}' -D '{}' -m fast -w stop >/dev/null 2>&1; {remove}",
            self.bin.join("pg_ctl").display(),
            self.data.display()
        );
        let mut guard = Command::new("/bin/sh");
        guard.args(["-c", &stop]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        guard.process_group(0); // Ctrl-C is for us; the guard follows when we are done
        if let Some(Account { uid, gid }) = self.user {
            guard.uid(uid).gid(gid);
        }
        self.guard = guard.spawn().map_err(|e| Error::io("/bin/sh", e))?;
        Ok(())
    }
}

impl Drop for PrivateServer {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// The directory of `initdb`, `postgres` and `pg_ctl`: `POSTGRES_BIN`, then PATH, then the usual places.
fn find_programs() -> Result<PathBuf> {
    let complete = |dir: &PathBuf| ["initdb", "postgres", "pg_ctl"].iter().all(|name| dir.join(name).exists());
    if let Some(dir) = std::env::var_os("POSTGRES_BIN").map(PathBuf::from) {
        return if complete(&dir) {
            Ok(dir)
        } else {
            Err(Error::Setup(format!(
                "POSTGRES_BIN is {}: initdb, postgres and pg_ctl are not all there",
                dir.display()
            )))
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for place in PLACES {
        dirs.extend(expand(place));
    }
    // A link on PATH leads to the real directory, beside which the server finds its files.
    dirs.into_iter()
        .filter_map(|dir| dir.join("postgres").canonicalize().ok()?.parent().map(Path::to_owned))
        .find(complete)
        .ok_or_else(|| {
            Error::Setup(
                "no PostgreSQL server programs (initdb, postgres, pg_ctl) on PATH or in the usual places; \
                 install them (Debian: apt-get install postgresql; Fedora: dnf install postgresql-server; \
                 macOS: brew install postgresql), or point POSTGRES_BIN to their directory"
                    .into(),
            )
        })
}

/// The directories that a place with one `*` names, newest version first.
fn expand(place: &str) -> Vec<PathBuf> {
    let (before, after) = place.split_once('*').expect("each place has a star");
    let (parent, prefix) = before.rsplit_once('/').expect("each place is absolute");
    let mut found: Vec<(Vec<u32>, PathBuf)> = std::fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.split('.').map(|n| n.parse().unwrap_or(0)).collect();
            Some((version, PathBuf::from(format!("{parent}/{name}{after}"))))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, dir)| dir).collect()
}

/// `postgres` if there is such an account, else `nobody`.
fn unprivileged() -> Result<Account> {
    let accounts = std::fs::read_to_string("/etc/passwd").map_err(|e| Error::io("/etc/passwd", e))?;
    let account = |wanted: &str| {
        let mut fields = accounts.lines().find(|line| line.starts_with(&format!("{wanted}:")))?.split(':').skip(2);
        Some(Account { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    };
    account("postgres").or_else(|| account("nobody")).ok_or_else(|| {
        Error::Setup("PostgreSQL cannot run as root, and there is no account postgres or nobody to run it as".into())
    })
}

fn give_to(path: &Path, user: Option<Account>) -> Result<()> {
    if let Some(Account { uid, gid }) = user {
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(|e| Error::io(path.display().to_string(), e))?;
    }
    Ok(())
}

/// A port that nobody uses, below those that systems give to outgoing connections: while the server is down,
/// nobody gets it by chance.
fn free_port() -> Result<u16> {
    let mut last = None;
    for _ in 0..100 {
        match std::net::TcpListener::bind(("127.0.0.1", rand::random_range(20_000..32_000))) {
            Ok(probe) => return probe.local_addr().map(|a| a.port()).map_err(|e| Error::io("127.0.0.1", e)),
            Err(error) => last = Some(error),
        }
    }
    Err(Error::io("127.0.0.1: no free port", last.expect("a hundred were tried")))
}

/// What `pgcue dev` tells other programs about itself, as JSON.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Ready {
    /// The database.
    pub database_url: String,
    /// The service port.
    pub http: String,
}

impl Ready {
    /// Where the running `pgcue dev` of this user leaves it for other commands.
    pub fn place() -> PathBuf {
        std::env::temp_dir().join(format!("pgcue-dev-{}.json", rustix::process::geteuid().as_raw()))
    }

    /// Write it at once and whole, readable for this user only.
    pub fn write(&self, path: &Path) -> Result<()> {
        let io = |e| Error::io(path.display().to_string(), e);
        let half = path.with_extension("part");
        let _ = std::fs::remove_file(&half);
        std::fs::write(&half, serde_json::to_string(self)? + "\n").map_err(io)?;
        std::fs::set_permissions(&half, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
        std::fs::rename(&half, path).map_err(io)
    }

    /// What a running `pgcue dev` of this user left, if it is this user's file.
    pub fn read() -> Option<Self> {
        let path = Self::place();
        let own = std::fs::symlink_metadata(&path).ok()?.uid() == rustix::process::geteuid().as_raw();
        own.then(|| serde_json::from_str(&std::fs::read_to_string(&path).ok()?).ok())?
    }
}
