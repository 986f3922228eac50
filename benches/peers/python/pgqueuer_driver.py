"""pgqueuer. See ../run.py for what the three commands have to do."""

import asyncio
from datetime import timedelta

import asyncpg
from bench import URL, hear, main, now, paced, say, setting
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries


async def connect():
    if setting("POOL", 0):
        return AsyncpgPoolDriver(await asyncpg.create_pool(URL, min_size=10, max_size=20))
    return AsyncpgDriver(await asyncpg.connect(URL))


async def install():
    """Its default, durable, keeps every table logged; the autovacuum settings are on its checklist."""
    queries = Queries(AsyncpgDriver(await asyncpg.connect(URL)))
    await queries.install()
    await queries.optimize_autovacuum()
    return queries


async def burn(n):
    queries = await install()
    for i in range(0, n, 10000):
        many = min(n - i, 10000)
        await queries.enqueue(["noop"] * many, [b'{"n": %d}' % k for k in range(i, i + many)], [0] * many)
    pgq = PgQueuer(await connect())

    @pgq.entrypoint("noop")
    async def noop(job):
        nonlocal n
        n -= 1
        if n == 0:
            say("handled")

    say("ready")
    await hear()
    # It fetches, and writes completions, batch_size at a time. Tried: 100, 200 and 2,000; a pool, which was no faster.
    asyncio.create_task(pgq.run(batch_size=setting("BATCH", 1000), dequeue_timeout=timedelta(seconds=1)))
    await hear()


async def work(n):
    await install()
    pgq = PgQueuer(await connect())
    latencies = []

    @pgq.entrypoint("stamp")
    async def stamp(job):
        latencies.append(now() - int(job.payload))

    asyncio.create_task(pgq.run(batch_size=setting("BATCH", 10)))
    await asyncio.sleep(1)
    say("ready")
    while len(latencies) < n:
        await asyncio.sleep(0.01)
    say(latencies)


async def send(rate, seconds):
    queries = Queries(AsyncpgDriver(await asyncpg.connect(URL)))
    await paced(rate, seconds, lambda: queries.enqueue("stamp", b"%d" % now()))


main(burn, work, send)
