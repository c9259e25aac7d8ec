"""Calls of every kind, one after the other on many threads, and what became of each."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import httpx

import qserve
from qserve import serve
from qserve.errors import QServeError
from tests.support.slowness import patience
from tests.support.waiting import joined

_TIMEOUT_S = 20.0


class Ended(NamedTuple):
    """A call; `error` is "" where its answer was the right one."""

    kind: str
    started: float
    took_s: float
    error: str


class Load:
    """Runs from the beginning of the block to its end.

    Args:
        url: Of the gateway.
        name: Of a deployment that returns what it is given.
    """

    def __init__(self, url: str, name: str = "echo") -> None:
        self._name = name
        self.ended: list[Ended] = []
        self.refs: list[tuple[int, str]] = []
        self._url = url
        self._over = threading.Event()
        kinds = [self._handle, self._handle, self._http, self._http, self._durable]
        self._threads = [threading.Thread(target=self._run, args=(kind, i)) for i, kind in enumerate(kinds)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        joined(*self._threads, limit_s=_TIMEOUT_S + 10)

    def answered_since(self, moment: float) -> set[str]:
        """The kinds of call of which one was made, and answered as it should be, after a moment."""
        return {call.kind for call in list(self.ended) if call.started > moment and not call.error}

    def _run(self, call: Callable[[int], str], number: int) -> None:
        value = number * 1_000_000
        while not self._over.is_set():
            value, started, kind = value + 1, time.monotonic(), call.__name__.removeprefix("_")
            try:
                error = call(value)
            except QServeError as exc:
                error = type(exc).__name__
            except httpx.HTTPError as exc:
                error = f"no response: {exc!r}"
            self.ended.append(Ended(kind, started, time.monotonic() - started, error))
            if error:
                time.sleep(0.05)

    def _handle(self, value: int) -> str:
        handle = serve.get_deployment(self._name).get_handle()
        answer = qserve.get(handle.options(timeout_s=patience(_TIMEOUT_S)).remote(value))
        return "" if answer == value else f"swapped: {answer!r}"

    def _durable(self, value: int) -> str:
        handle = serve.get_deployment(self._name).get_handle().options(durable=True, timeout_s=patience(_TIMEOUT_S))
        ref = handle.remote(value)
        self.refs.append((value, ref.id))
        answer = qserve.get(ref)
        return "" if answer == value else f"swapped: {answer!r}"

    def _http(self, value: int) -> str:
        response = httpx.get(f"{self._url}/{self._name}", params={"value": value}, timeout=_TIMEOUT_S + 5)
        if response.status_code in (502, 503, 504):
            return str(response.status_code)
        return "" if response.text == str(value) else f"swapped: {response.status_code} {response.text!r}"
