"""Something to take pictures of: deployments that are busy in their own ways."""

import asyncio
import bisect
import contextlib
import itertools
import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from qserve import serve
from qserve.broker.history.buckets import BOUNDS_MS, BUCKET_S, Bucket
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.settings import Settings
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S


@serve.deployment(num_replicas=2)
def Translate(text: str) -> str:  # noqa: N802
    """Quick."""
    return text.upper()


@serve.deployment(max_queued_requests=200)
async def Summarize(text: str) -> str:  # noqa: N802
    """Takes as long as the text is, and fails now and then."""
    await asyncio.sleep(0.05 + len(text) / 100)
    if "!" in text:
        raise ValueError("the document is empty")
    return text[:3]


@serve.deployment
def Embed(text: str) -> list[float]:  # noqa: N802
    """Fails for short texts."""
    time.sleep(0.1)
    if len(text) < 3:
        raise RuntimeError(f"too short: {text!r}")
    return [float(len(text))]


@serve.deployment(max_queued_requests=20)
def Transcribe(text: str) -> str:  # noqa: N802
    """Slow."""
    time.sleep(1.0)
    return text


_RATES = {"Translate": (180, 0.4, 0), "Summarize": (90, 90, 3), "Embed": (30, 110, 1), "Transcribe": (9, 1000, 0)}
"""For the minutes before the test: calls in ten seconds, how many ms one takes, and how many of them fail."""


@contextmanager
def fill(settings: Settings) -> Iterator[tuple[str, list[str]]]:
    """The id of a call that was tried three times, and the names of what is deployed."""
    deployments = [Translate, Summarize, Embed, Transcribe]
    for each in deployments:
        each.deploy()
    _make_past(settings)
    over = threading.Event()

    def call(name: str, words: list[str], pause_s: float) -> None:
        handle = serve.get_deployment(name).get_handle()
        for word in itertools.cycle(words):
            handle.remote(word)
            if over.wait(pause_s):
                return

    texts = [*["report", "a letter"] * 8, "!"]
    busy = [
        ("Translate", ["hello"], 0.02),
        ("Summarize", texts, 0.1),
        ("Transcribe", ["a"], 0.7),
    ]
    threads = [threading.Thread(target=call, args=each) for each in busy]
    for thread in threads:
        thread.start()
    try:
        yield _try_in_vain(), [each.name for each in deployments]
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _make_past(settings: Settings) -> None:
    """Nobody waits for ten minutes to take a picture."""
    client = redis_clients.client(settings.redis_url, 5)
    chance, now = random.Random(7), int(time.time()) // BUCKET_S
    for name, (calls, ms, failed) in _RATES.items():
        for back in range(1, 60):
            arrivals = int(calls * (1 + 0.35 * math.sin(back / 7) + chance.uniform(-0.15, 0.15)))
            fails = chance.randint(0, 2 * failed)
            queued = max(0, int(arrivals * ms / 20_000 + chance.uniform(-1, 1)))
            place = bisect.bisect_left(BOUNDS_MS, ms)
            runs = (place, int(arrivals * 0.7), place + 1, int(arrivals * 0.25), place + 3, arrivals // 20)
            waits = (2, int(arrivals * 0.6), 5, int(arrivals * 0.3), 12, arrivals // 10)
            ends = ("done", arrivals - fails, "failed", fails)
            bucket = Bucket(now - back, arrivals, 0, queued, 0, 0.0, 1, ends, waits, runs)
            client.rpush(settings.keys.buckets(name), msgspec.msgpack.encode(bucket))


def _try_in_vain() -> str:
    durable = serve.get_deployment("Embed").get_handle().options(durable=True, retries=2, backoff=0.5)
    refs = [durable.remote(text) for text in ("first", "second", "no", "third")]
    for ref in refs:
        with contextlib.suppress(QServeError, RuntimeError):
            ref.result(patience(LIMIT_S))
    return refs[2].id
