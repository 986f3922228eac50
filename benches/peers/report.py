"""The table and the picture."""

import os
import platform
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from statistics import median

from contestants import CONTESTANTS, ROOT, command


def machine():
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = subprocess.run(["stat", "-f", "-c", "%T", tempfile.gettempdir()], capture_output=True, text=True)
    disk = found.stdout.strip() or "unknown"
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores ({cpu or platform.machine()}), {memory:.0f} GB, "
        f"{platform.system()} {platform.release().split('-')[0]}, data on {disk}; load average at the start {load:.1f}"
    )


def middle(rounds, key):
    return median(r[key] for r in rounds) if rounds else None


def ratio(results, name, measure, key):
    """The median of the ratios to pgcue, each within one round."""
    if "pgcue" not in results or not results[name][measure]:
        return "-"
    pairs = zip(results[name][measure], results["pgcue"][measure])
    return f"{median(ours[key] / theirs[key] for ours, theirs in pairs):.2f}"


def table(results):
    lines = [
        "| queue | jobs/s | to pgcue | p50 ms | p95 ms | p99 ms | p50 to pgcue | keeps |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, result in results.items():
        cells = [CONTESTANTS[name]["label"]]
        cells += [f"{middle(result['burn'], 'jobs_per_second'):,.0f}", ratio(results, name, "burn", "jobs_per_second")]
        if result["latency"]:
            cells += [f"{middle(result['latency'], p):.1f}" for p in ("p50", "p95", "p99")]
            cells += [ratio(results, name, "latency", "p50")]
        else:
            cells += ["", "", "", ""]
        lines.append("| " + " | ".join([*cells, CONTESTANTS[name]["keeps"]]) + " |")
    return lines


def small_print(results):
    for name, result in results.items():
        burn = " ".join(f"{r['jobs_per_second']:,.0f}" for r in result["burn"])
        late = ", ".join(" / ".join(f"{r[p]:.1f}" for p in ("p50", "p95", "p99")) for r in result["latency"])
        left = {r["left"] for r in result["burn"] if "left" in r}
        rows = f"; {' or '.join(f'{n:,}' for n in sorted(left))} rows left" if left else ""
        jobs = f"{result['burn'][0]['jobs']:,} jobs, jobs/s: {burn}{rows}"
        yield f"- {CONTESTANTS[name]['label']}: {jobs}" + (f"; p50 / p95 / p99 ms: {late}" if late else "")


def picture(results, path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "pgcue", "font.size": 9})
    from matplotlib import pyplot

    names = list(results)
    labels = [CONTESTANTS[name]["label"] for name in names]
    colours = ["#c44e52" if name.startswith("pgcue") else "#8c9bb0" for name in names]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.5 + 0.45 * len(names)), layout="constrained")
    speeds = [middle(results[name]["burn"], "jobs_per_second") for name in names]
    bars = left.barh(labels, speeds, color=colours)
    left.bar_label(bars, [f"{s:,.0f}" for s in speeds], padding=3)
    left.set_title("burn-down, jobs/s (more is better)")
    left.margins(x=0.18)
    late = [name for name in names if results[name]["latency"]]
    labels = [CONTESTANTS[name]["label"] for name in late]
    for p, alpha in (("p99", 0.35), ("p50", 1.0)):
        values = [middle(results[name]["latency"], p) for name in late]
        bars = right.barh(labels, values, color=[colours[names.index(name)] for name in late], alpha=alpha)
        if p == "p99":
            halves = [middle(results[name]["latency"], "p50") for name in late]
            right.bar_label(bars, [f"{h:.1f} / {v:.1f}" for h, v in zip(halves, values)], padding=3)
    right.set_title("latency, ms: p50 / p99 (less is better)")
    right.margins(x=0.25)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def commands(options, results):
    """One line for each process that measures, to be repeated by hand."""
    for name in results:
        jobs, pace = results[name]["burn"][0]["jobs"], (options.rate, max(1, options.latency_seconds // options.rounds))
        if "bench" in CONTESTANTS[name]:
            lines = [("burn-down", "--jobs", jobs, "--bare-jobs", 0)]
            lines += [("latency", "--rate", pace[0], "--seconds", pace[1])] if results[name]["latency"] else []
        else:
            lines = [("burn", jobs), ("work", pace[0] * (pace[1] + 1)), ("send", pace[0], pace[1] + 1)]
        for line in lines:
            yield " ".join(command(name, *line)).replace(f"{ROOT}/", "")


def write(options, results, facts):
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture(results, options.out.with_name("results.svg"))
    settings = ", ".join(f"`{name} = {value}`" for name, value in facts["settings"].items())
    asked = f"--jobs {options.jobs} --rounds {options.rounds} --latency-seconds {options.latency_seconds}"
    how = [f"- {CONTESTANTS[n]['label']}, {facts['versions'][n]}: {CONTESTANTS[n]['settings']}" for n in results]
    text = f"""# pgcue beside other PostgreSQL job queues

Measured on {date.today()} by `python3 benches/peers/run.py {asked} --rate {options.rate}`, which installs what it needs
under `target/peers/`. Medians of {options.rounds} rounds; a ratio to pgcue is taken within each round, then the median.

![burn-down and latency](results.svg)

{chr(10).join(table(results))}

**Burn-down** (jobs/s): no-op jobs are enqueued in bulk, then `vacuum analyze`; the clock runs from the start of the run
of one worker process, warm and connected, until the last job is completed in the database. pgcue's node is started
before the clock and its queue paused until then. **Latency** (ms): {options.rate} single jobs a second from one process to an
idle worker in another, from just before the enqueuing call to the handler's first statement, without the first
second. Each measurement has a fresh database, after a `checkpoint`; the queues take turns round by round. Both Rust
programs are built with thin LTO. Of the settings that its documentation offers each has those that were fastest in a
few trials, for burn-down and latency apart:

{chr(10).join(how)}

Machine: {facts['machine']}. Server: {facts['server']}, {settings}, on the same machine.

Commands, each with `DATABASE_URL` (`--database-url` for pgcue); `burn` waits for a line before it goes on:

```sh
{chr(10).join(commands(options, results))}
```

<sub>

All rounds:

{chr(10).join(small_print(results))}

</sub>
"""
    options.out.write_text(text)
