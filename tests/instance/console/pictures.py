"""Something to take pictures of: deployments that are busy in their own ways."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qserve import serve
from qserve.errors import QServeError
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


@contextmanager
def fill() -> Iterator[tuple[str, list[str]]]:
    """The id of a call that was tried three times, and the names of what is deployed."""
    deployments = [Translate, Summarize, Embed, Transcribe]
    for each in deployments:
        each.deploy()
    over = threading.Event()

    def call(name: str, words: list[str], pause_s: float) -> None:
        handle = serve.get_deployment(name).get_handle()
        for word in itertools.cycle(words):
            handle.remote(word)
            if over.wait(pause_s):
                return

    busy = [("Translate", ["hello"], 0.02), ("Summarize", ["report", "a letter", "!"], 0.1), ("Transcribe", ["a"], 0.7)]
    threads = [threading.Thread(target=call, args=each) for each in busy]
    for thread in threads:
        thread.start()
    try:
        yield _try_in_vain(), [each.name for each in deployments]
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _try_in_vain() -> str:
    durable = serve.get_deployment("Embed").get_handle().options(durable=True, retries=2, backoff=0.5)
    refs = [durable.remote(text) for text in ("first", "second", "no", "third")]
    for ref in refs:
        with contextlib.suppress(QServeError, RuntimeError):
            ref.result(patience(LIMIT_S))
    return refs[2].id
