"""What both drivers share: talk with run.py over standard input and output."""

import asyncio
import os
import sys
import time

import uvloop

URL = os.environ["DATABASE_URL"]


def now():
    return time.time_ns() // 1000


def say(line):
    print(line, flush=True)


async def hear():
    await asyncio.to_thread(sys.stdin.readline)


def setting(name, default):
    return int(os.environ.get(name, default))


async def paced(rate, seconds, send):
    """Each at its time, whether the ones before were answered or not."""
    start, sent = time.monotonic(), []
    for i in range(rate * seconds):
        await asyncio.sleep(max(0, start + i / rate - time.monotonic()))
        sent.append(asyncio.ensure_future(send()))
    await asyncio.gather(*sent)


def main(burn, work, send):
    command, *numbers = sys.argv[1:]

    async def go():
        await {"burn": burn, "work": work, "send": send}[command](*map(int, numbers))
        sys.stdout.flush()
        os._exit(0)  # without waiting for a shutdown that is not measured

    uvloop.run(go()) if setting("UVLOOP", 1) else asyncio.run(go())
