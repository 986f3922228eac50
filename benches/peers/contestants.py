"""Who takes part: its driver, how to see in the database that all is done, what is left, and what to print.

`share`: the slower ones get that part of the jobs, so that a run does not take hours; jobs/s does not suffer.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "target" / "peers"
PYTHON = CACHE / "venv" / "bin" / "python"
NODE = CACHE / "venv" / "bin" / "node"
PGCUE = ROOT / "target" / "release" / "pgcue"

GRAPHILE = {
    "share": 1,
    "done": "select not exists (select from graphile_worker._private_jobs)",
    "left": "select count(*) from graphile_worker._private_jobs",
    "keeps": "nothing: jobs are deleted",
}
CONTESTANTS = {
    "pgcue": {
        "label": "pgcue",
        "share": 1,
        "bench": [],
        "keeps": "every job, in the history",
        "settings": "its defaults",
    },
    "pgcue-no-history": {
        "label": "pgcue, history off",
        "share": 1,
        "bench": ["--history", "off"],
        "keeps": "nothing: jobs are deleted",
        "settings": "its defaults, but no history",
    },
    "graphile_worker": {
        "label": "graphile_worker (Rust)",
        "driver": [CACHE / "cargo" / "release" / "graphile_worker_bench"],
        "settings": "a local queue of 5,000, 48 at once, completions batched after 1 ms, filled by SQL `add_jobs`; "
        "for latency 4 at once without local queue and batches",
        **GRAPHILE,
    },
    "graphile-worker": {
        "label": "graphile-worker (Node)",
        "driver": [NODE, CACHE / "node" / "graphile-worker.mjs"],
        "settings": "a local queue of 2,000, 200 at once, `completeJobBatchDelay` 0, filled by SQL `add_jobs`; for "
        "latency 10 at once without local queue and batches",
        **GRAPHILE,
    },
    "pg-boss": {
        "label": "pg-boss (Node)",
        "driver": [NODE, CACHE / "node" / "pg-boss.mjs"],
        "share": 0.5,
        "done": "select not exists (select from pgboss.job where name = 'noop' and state < 'completed')",
        "left": "select count(*) from pgboss.job where name = 'noop'",
        "keeps": "every job, for 7 days",
        "settings": "batches of 1,000, 4 at once, `burstWhenBatchFull`, filled by `insert`; for latency "
        "LISTEN/NOTIFY and batches of 10, 1 at once",
    },
    "procrastinate": {
        "label": "procrastinate (Python)",
        "driver": [PYTHON, HERE / "python" / "procrastinate_driver.py"],
        "share": 0.02,
        "done": "select not exists (select from procrastinate_jobs where status in ('todo', 'doing'))",
        "left": "select count(*) from procrastinate_jobs",
        "keeps": "every job",
        "settings": "4 workers with 20 jobs at once each in one process, uvloop, filled by `batch_defer`; "
        "for latency 1 worker with 4 at once",
    },
    "pgqueuer": {
        "label": "pgqueuer (Python)",
        "driver": [PYTHON, HERE / "python" / "pgqueuer_driver.py"],
        "share": 0.2,
        "done": "select not exists (select from pgqueuer)",
        "left": "select count(*) from pgqueuer_log",
        "keeps": "a log of 3 rows for each job",
        "settings": "batches of 1,000, durable tables (the default), its autovacuum settings, asyncpg, uvloop, filled "
        "by `enqueue` with lists; for latency batches of 10",
    },
}


def command(name, *arguments):
    """The command that measures, as a list."""
    contestant = CONTESTANTS[name]
    start = [PGCUE, "bench"] if "bench" in contestant else contestant["driver"]
    return [str(part) for part in (*start, *arguments, *contestant.get("bench", []))]
