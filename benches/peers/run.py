#!/usr/bin/env python3
"""Measure pgcue beside other PostgreSQL job queues: python3 benches/peers/run.py [--quick]

One private server for all; every measurement has a fresh database, and the contestants take turns round
by round, so that what disturbs the machine disturbs them alike. Everything is installed under target/peers/.

A driver is a program with DATABASE_URL in its environment and three commands, each one process:
  burn N             migrate, enqueue N no-op jobs in bulk, print "ready", wait for a line, run a worker,
                     print "handled" when N handlers have run
  work N             migrate, run an idle worker, print "ready", and when N jobs came their latencies (us)
  send RATE SECONDS  enqueue single jobs at that pace with the time (us) in the payload
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import report
from contestants import CACHE, CONTESTANTS, HERE, NODE, PYTHON, ROOT, command
from server import SETTINGS, Server

TIMEOUT = 300


def install(names):
    """What the contestants need, in a place of its own; done again at once if nothing changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", PYTHON.parents[1]], check=True)
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", HERE / "requirements.txt"]
    subprocess.run(pip, check=True)
    node = CACHE / "node"
    node.mkdir(exist_ok=True)
    before = (node / "package-lock.json").read_text() if (node / "package-lock.json").exists() else ""
    for file in (HERE / "node").iterdir():
        shutil.copy(file, node)
    if before != (node / "package-lock.json").read_text() or not (node / "node_modules").exists():
        path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
        npm = [PYTHON.parent / "npm", "ci", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=node, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
    if "graphile_worker" in names:
        target = {"CARGO_TARGET_DIR": str(CACHE / "cargo")}
        build = ["cargo", "build", "--release", "--locked", "--quiet"]
        subprocess.run(build, cwd=HERE / "graphile_worker", check=True, env=os.environ | target)
    if any(name.startswith("pgcue") for name in names):
        subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=ROOT, check=True)


class Driver:
    """One process of a driver, spoken with line by line."""

    def __init__(self, name, url, *arguments):
        self.process = subprocess.Popen(
            command(name, *arguments),
            env=os.environ | {"DATABASE_URL": url},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def hear(self, expected=None):
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        line = self.process.stdout.readline().strip() if ready else "nothing in time"
        if expected and line != expected:
            raise SystemExit(f"{self.name} says {line!r} instead of {expected!r}")
        return line

    def say(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def burn_down(name, url, database, jobs):
    """Jobs per second, from the start of the worker's run until no job is left to do in the database."""
    with Driver(name, url, "burn", jobs) as driver:
        driver.hear("ready")
        database.execute("vacuum analyze")
        start = time.perf_counter()
        driver.say()
        driver.hear("handled")
        while not database.execute(CONTESTANTS[name]["done"]).fetchone()[0]:
            time.sleep(0.001)
        seconds = time.perf_counter() - start
        left = database.execute(CONTESTANTS[name]["left"]).fetchone()[0]
    return {"jobs": jobs, "jobs_per_second": jobs / seconds, "left": left}


def latency(name, url, rate, seconds):
    """Milliseconds from just before the enqueuing call in one process to the handler in another.

    The first second, in which the sender connects and everything warms up, is not counted.
    """
    with Driver(name, url, "work", rate * (seconds + 1)) as worker:
        worker.hear("ready")
        with Driver(name, url, "send", rate, seconds + 1) as sender:
            if sender.process.wait(TIMEOUT):
                raise SystemExit(f"{name}: the sender failed")
        took = sorted(json.loads(worker.hear())[rate:])
    return {f"p{p}": took[max(0, -(-len(took) * p // 100) - 1)] / 1000 for p in (50, 95, 99)}


def pgcue(name, url, *arguments):
    """pgcue measures itself: the same clock, and the same way to enqueue and to note the latency."""
    arguments = command(name, *arguments, "--json", "--database-url", url)
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, timeout=TIMEOUT).stdout)


def measure(what, name, url, database, options):
    ours = "bench" in CONTESTANTS[name]
    if what == "latency":
        rate, seconds = options.rate, max(1, options.latency_seconds // options.rounds)
        if not ours:
            return latency(name, url, rate, seconds)
        found = pgcue(name, url, "latency", "--rate", rate, "--seconds", seconds)
        return {p: found["stamp_ms"][p] for p in ("p50", "p95", "p99")}
    jobs = max(100, int(options.jobs * CONTESTANTS[name]["share"]))
    if not ours:
        return burn_down(name, url, database, jobs)
    found = pgcue(name, url, "burn-down", "--jobs", jobs, "--bare-jobs", 0)
    return {"jobs": jobs, "jobs_per_second": found["jobs_per_second"]}


def version(name):
    """What is measured, from what was installed."""
    from importlib.metadata import version

    def told(*of):
        return subprocess.run(of, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    if "bench" in CONTESTANTS[name]:
        pgcue = told(*command(name)[:1], "--version").removeprefix("pgcue ")
        return f"{pgcue}, commit {told('git', 'rev-parse', '--short', 'HEAD')}"
    if name == "graphile_worker":
        lock = (HERE / "graphile_worker" / "Cargo.lock").read_text()
        crate = lock.split('name = "graphile_worker"\nversion = "')[1].split('"')[0]
        return f"{crate}, {told('rustc', '--version').split(' (')[0]}"
    if CONTESTANTS[name]["driver"][0] == NODE:
        package = CACHE / "node" / "node_modules" / name / "package.json"
        return f"{json.loads(package.read_text())['version']}, Node {told(NODE, '--version').removeprefix('v')}"
    through = {"procrastinate": "psycopg", "pgqueuer": "asyncpg"}[name]
    return f"{version(name)}, {through} {version(through)}, Python {sys.version.split()[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency-seconds", type=int, default=20, help="of each queue, spread over the rounds")
    parser.add_argument("--rate", type=int, default=100)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="10000 jobs, 2 rounds, 4 seconds of latency")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.rounds, options.latency_seconds = 10_000, 2, 4
    install(options.only)
    if Path(sys.prefix) != PYTHON.parents[1]:
        os.execv(PYTHON, [PYTHON, __file__, *sys.argv[1:]])

    import psycopg

    facts = {"machine": report.machine(), "settings": SETTINGS}
    facts["versions"] = {name: version(name) for name in options.only}
    results = {name: {"burn": [], "latency": []} for name in options.only}
    server = Server()
    try:
        admin = psycopg.connect(server.url + "postgres", autocommit=True)
        facts["server"] = "PostgreSQL " + admin.execute("show server_version").fetchone()[0]
        turns = [("burn", name) for name in options.only]
        # pgcue reads its latencies in the history.
        turns += [("latency", name) for name in options.only if name != "pgcue-no-history"]
        for what, name in turns * options.rounds:
            admin.execute("create database peers")
            admin.execute("checkpoint")
            url = server.url + "peers"
            with psycopg.connect(url, autocommit=True) as database:
                result = measure(what, name, url, database, options)
            results[name][what].append(result)
            print(name, what, {key: round(value, 2) for key, value in result.items()}, flush=True)
            admin.execute("drop database peers with (force)")
    finally:
        server.stop()
    report.write(options, results, facts)


if __name__ == "__main__":
    main()
