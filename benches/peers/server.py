"""A private PostgreSQL server, as src/dev.rs has one: loopback only, behind a password, gone with us."""

import glob
import os
import pwd
import random
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time

SETTINGS = {
    "fsync": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "max_connections": "200",
}
PLACES = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/lib64/pgsql*/bin",
    "/usr/local/pgsql*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
]


def find_programs():
    """The directory of initdb and postgres: POSTGRES_BIN, then PATH, then the usual places, newest first."""
    version = lambda place: [int(n) for n in re.findall(r"\d+", place)]
    usual = (sorted(glob.glob(place), key=version, reverse=True) for place in PLACES)
    dirs = os.environ.get("PATH", "").split(os.pathsep) + [d for found in usual for d in found]
    if "POSTGRES_BIN" in os.environ:
        dirs = [os.environ["POSTGRES_BIN"]]
    for directory in dirs:
        # a link on PATH leads to the real directory
        real = os.path.dirname(os.path.realpath(os.path.join(directory, "postgres")))
        if all(os.path.exists(os.path.join(real, name)) for name in ("initdb", "postgres")):
            return real
    raise SystemExit("no PostgreSQL server programs (initdb, postgres); POSTGRES_BIN may name their directory")


def account():
    """PostgreSQL refuses to run as root: then postgres, or nobody."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            pass
    raise SystemExit("PostgreSQL cannot run as root, and there is no account postgres or nobody")


def free_port():
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass
    raise SystemExit("127.0.0.1: no free port")


class Server:
    def __init__(self):
        bin, user = find_programs(), account()
        self.home = tempfile.mkdtemp(prefix="pgcue-peers-")
        data, password = os.path.join(self.home, "data"), secrets.token_hex(12)
        with open(os.path.join(self.home, "password"), "w", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            file.write(password)
        run_as = {"cwd": "/", "env": {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}}
        if user:
            for path in (self.home, file.name):
                os.chown(path, user.pw_uid, user.pw_gid)
            run_as |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        initdb = [f"{bin}/initdb", "-D", data, f"--pwfile={file.name}", "-U", "peers", "-A", "scram-sha-256"]
        initdb += ["-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **run_as)
        port = free_port()
        settings = SETTINGS | {"port": port, "listen_addresses": "'127.0.0.1'", "unix_socket_directories": "''"}
        with open(os.path.join(data, "postgresql.conf"), "w") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        self.url = f"postgres://peers:{password}@127.0.0.1:{port}/"
        # The shell outlives nobody: its input closes however this process ends, then it stops the server.
        script = f"{bin}/postgres -D {data} >{self.home}/log 2>&1 & cat >/dev/null; kill -INT $!; wait; "
        script += f"rm -rf {shlex.quote(self.home)}"
        self.guard = subprocess.Popen(
            ["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True, **run_as
        )
        self.wait()

    def wait(self):
        import psycopg

        for _ in range(300):
            try:
                psycopg.connect(self.url + "postgres").close()
                return
            except psycopg.OperationalError as error:
                last = error
                time.sleep(0.1)
        with open(os.path.join(self.home, "log")) as log:
            print(log.read())
        raise SystemExit(f"the server does not answer: {last}")

    def stop(self):
        self.guard.stdin.close()
        self.guard.wait()
        shutil.rmtree(self.home, ignore_errors=True)
