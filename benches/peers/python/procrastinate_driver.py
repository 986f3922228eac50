"""procrastinate. See ../run.py for what the three commands have to do."""

import asyncio
import logging

import procrastinate
from bench import URL, hear, main, now, paced, say, setting

logging.getLogger("procrastinate").setLevel(logging.ERROR)
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=URL, min_size=10, max_size=20))
left = 0
latencies = []
background = []


@app.task(name="noop")
async def noop(n):
    global left
    left -= 1
    if left == 0:
        say("handled")


@app.task(name="stamp")
async def stamp(us):
    latencies.append(now() - us)


async def work_in_background(workers, **options):
    """A worker fetches one job at a time; concurrency is how many run and complete meanwhile. So several.

    Tried: 1, 2 and 8 workers, 5 at once, deleting what is done, asyncio's own loop.
    """
    for _ in range(workers):
        background.append(asyncio.create_task(app.run_worker_async(install_signal_handlers=False, **options)))


async def burn(n):
    global left
    left = n
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for i in range(0, n, 1000):
            await noop.batch_defer_async(*({"n": k} for k in range(i, min(n, i + 1000))))
        say("ready")
        await hear()
        delete = "successful" if setting("DELETE", 0) else "never"
        await work_in_background(setting("WORKERS", 4), concurrency=setting("CONCURRENCY", 20), delete_jobs=delete)
        await hear()


async def work(n):
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await work_in_background(setting("WORKERS", 1), concurrency=setting("CONCURRENCY", 4))
        await asyncio.sleep(1)
        say("ready")
        while len(latencies) < n:
            await asyncio.sleep(0.01)
        say(latencies)


async def send(rate, seconds):
    async with app.open_async():
        await paced(rate, seconds, lambda: stamp.defer_async(us=now()))


main(burn, work, send)
