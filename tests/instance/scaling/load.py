"""Continuous load with a ledger: every call's id, how it was made and how it ended, each answer checked.

Clients of three kinds, each on a thread of its own: HTTP over connections that are kept (a client that finds its
gateway closed goes to the next, as a load balancer would), handles, and durable calls, submitted and then collected.
"""

import contextlib
import http.client
import itertools
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from qserve.calls.handle import get_handle
from tests.instance.scaling.loaded import answer_to, ran
from tests.support.slowness import patience
from tests.support.waiting import joined

TIMEOUT_S = 40.0
"""Of every call: longer than anything a test does to the replicas takes."""


@dataclass(frozen=True)
class Ended:
    """One call: its id, how it was made (http, handle or durable), what went wrong ("" for nothing), how long it took,
    and what it returned."""

    call: str
    how: str
    error: str
    seconds: float
    result: dict[str, Any]


@dataclass(frozen=True)
class Gone(Exception):
    """A gateway took no request: it may be sent elsewhere."""

    why: str


class Gateways:
    """An HTTP client of several gateways: keeps to one while it answers."""

    def __init__(self, urls: Sequence[str], path: str) -> None:
        self._addresses = itertools.cycle([(str(parts.hostname), parts.port) for parts in map(urlsplit, urls)])
        self._path = path
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, call: str) -> dict[str, Any]:
        """One GET, sent again elsewhere only if a gateway closed the connection before it answered anything."""
        end = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self._try(call)
            except Gone:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _try(self, call: str) -> dict[str, Any]:
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(*next(self._addresses), timeout=patience(TIMEOUT_S))
            self._connection.request("GET", f"{self._path}?call={call}")
            response = self._connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected) as exc:
            self.close()
            raise Gone(repr(exc)) from exc
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {body[:300]!r}")
        if response.will_close:
            self.close()
        found: dict[str, Any] = json.loads(body)
        return found

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Load:
    """Keeps clients calling from `with` to its end, which waits for the calls under way.

    Args:
        name: Deployment to call; its route is `/<name>`.
        notes: File in which its replicas note the calls that they run.
        urls: Gateways, for the HTTP clients.
        http, handles, durable: How many clients of each kind.
        pause_s: Between two calls of one client.
    """

    def __init__(
        self,
        name: str,
        notes: Path,
        *,
        urls: Sequence[str] = (),
        http: int = 2,
        handles: int = 2,
        durable: int = 1,
        pause_s: float = 0.003,
    ) -> None:
        self.ended: list[Ended] = []
        self._name = name
        self._notes = notes
        self._pause_s = pause_s
        self._urls = urls
        self._stop = threading.Event()
        self._changed = threading.Condition()
        kinds = [("http", self._http)] * (http if urls else 0)
        kinds += [("handle", self._handle)] * handles + [("durable", self._durable)] * durable
        self._threads = [threading.Thread(target=self._run, args=kind, daemon=True) for kind in kinds]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        joined(*self._threads, limit_s=TIMEOUT_S + 10)
        if exc is not None:
            exc.add_note(f"load: {self.summary()}")

    def more(self, calls: int = 50, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until that many more calls have ended."""
        goal = len(self.ended) + calls
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ended) >= goal, timeout_s), self.summary()

    def until(self, condition: Callable[[Ended], object], timeout_s: float = TIMEOUT_S) -> None:
        """Wait for a call that ends from now on in a certain way."""
        seen = len(self.ended)
        with self._changed:
            found = self._changed.wait_for(lambda: any(map(condition, self.ended[seen:])), timeout_s)
        assert found, self.summary()

    def check(self, *others: "Load") -> None:
        """Every call has ended, none failed, each with its own answer, and each ran exactly once.

        Args:
            others: Loads whose replicas made their notes in the same file.
        """
        loads = (self, *others)
        for load in loads:
            assert not [thread for thread in load._threads if thread.is_alive()], "a call never ended"
            failed = [each for each in load.ended if each.error]
            assert not failed, f"{load.summary()}: {failed[:5]}"
        runs = Counter(ran(self._notes))
        assert {call: count for call, count in runs.items() if count != 1} == {}
        assert runs.keys() == {each.call for load in loads for each in load.ended}

    def summary(self) -> str:
        """How many of each kind ended how."""
        counts = Counter((each.how, each.error[:120]) for each in list(self.ended))
        slowest = max((each.seconds for each in list(self.ended)), default=0.0)
        return f"{dict(counts)}, the slowest took {slowest:.2f} s"

    # The clients

    def _run(self, how: str, client: Callable[[], Any]) -> None:
        with client() as ask:
            while not self._stop.is_set():
                call, started, result, error = secrets.token_hex(8), time.monotonic(), {}, ""
                try:
                    result = ask(call)
                    if result.get("answer") != answer_to(call):
                        error = f"wrong answer {result}"
                except Exception as exc:  # whatever it is: it goes into the ledger
                    error = f"{type(exc).__name__}: {exc}"
                with self._changed:
                    self.ended.append(Ended(call, how, error, time.monotonic() - started, result))
                    self._changed.notify_all()
                time.sleep(self._pause_s)

    @contextlib.contextmanager
    def _http(self) -> Iterator[Callable[[str], dict[str, Any]]]:
        client = Gateways(self._urls, f"/{self._name}")
        yield client.ask
        client.close()

    @contextlib.contextmanager
    def _handle(self) -> Iterator[Callable[[str], dict[str, Any]]]:
        handle: Any = get_handle(self._name).options(timeout_s=patience(TIMEOUT_S))
        yield lambda call: handle.remote(call).result(TIMEOUT_S + 5)

    @contextlib.contextmanager
    def _durable(self) -> Iterator[Callable[[str], dict[str, Any]]]:
        handle: Any = get_handle(self._name).options(durable=True)
        yield lambda call: handle.remote(call).result(TIMEOUT_S + 5)
