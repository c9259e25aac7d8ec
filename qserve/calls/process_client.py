"""The client of this process. It is made at the first call, on a thread of its own, unless the process brings one.

This module owns the only global state of the calling side.
"""

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from qserve.calls.client import Client
from qserve.calls.ref import Ref
from qserve.settings import Settings


class ClientThread:
    """A client with a loop on a daemon thread."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._started: Future[None] = Future()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="qserve-client", daemon=True)

    def start(self) -> None:
        """Connect; raises what `Client.start` raises."""
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Disconnect and end the thread; calls still pending end as cancelled."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=5)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self.client.start()
        except BaseException as exc:
            self._started.set_exception(exc)
            return
        self._started.set_result(None)
        await self._stop.wait()
        await self.client.stop()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop loop where uvloop is installed, else asyncio's."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class _ClientHere:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.client: Client | None = None
        self.thread: ClientThread | None = None
        self.others: Callable[[], list[int]] = list
        self.find_settings: Callable[[], Settings] = Settings
        self.abandoned: list[Any] = []


_here = _ClientHere()


def set_settings_finder(find: Callable[[], Settings]) -> None:
    """Say how a process that makes its client at the first call finds its instance."""
    _here.find_settings = find


def current_client() -> Client:
    """The client of this process.

    Raises:
        NoInstanceError: No instance can be found from here.
        BrokerUnavailable, ConfigurationError: Redis cannot be used.
    """
    return _here.client or _start_client()


def _start_client() -> Client:
    with _here.lock:
        if _here.client is None:
            thread = ClientThread(Client(_here.find_settings()))
            thread.start()
            _here.thread, _here.client = thread, thread.client
        return _here.client


def set_current_client(client: Client | None, others: Callable[[], list[int]] = list) -> None:
    """Use a client that runs on an event loop of the process itself, as in a replica.

    Args:
        others: File descriptors of other connections that a process forked from this one is not to keep open: on one
            that outlives its process the server would still give out calls.
    """
    with _here.lock:
        _here.client, _here.others = client, others


@contextlib.contextmanager
def using_client(client: Client) -> Iterator[None]:
    """A block in which this process uses a client of its own, on a thread; the one before it is left alone."""
    thread = ClientThread(client)
    thread.start()
    with _here.lock:
        before, _here.client = _here.client, client
    try:
        yield
    finally:
        with _here.lock:
            _here.client = before
        thread.stop()


def close_current_client(*, unless: Settings | None = None) -> None:
    """Stop the client that this process made for itself; the next call makes a new one.

    Args:
        unless: A client with these settings is left alone, so that its pending calls go on.
    """
    with _here.lock:
        if unless is not None and _here.client is not None and _here.client.settings == unless:
            return
        thread, _here.thread = _here.thread, None
        if thread is not None:
            _here.client = None
    if thread is not None:
        thread.stop()


def _refuse_in_child() -> bool:
    raise RuntimeError(
        "the call was made before this process was forked, and its result arrives in the process that has made it: "
        "wait for it there, or make the call again here"
    )


def _forget_in_child() -> None:
    # The parent's thread does not exist here, but its sockets do: close this process' copies and start afresh. The old
    # objects are kept alive, because their destructors would act on the parent's event loop.
    client, others = _here.client, _here.others
    _here.abandoned.append((client, _here.thread, others))
    _here.lock = threading.Lock()
    _here.client = _here.thread = None
    _here.others = list
    if client is not None:
        Ref.in_forked_child = True
        for each in client.all():
            each.is_own_thread = _refuse_in_child
    for descriptor in (*(client.descriptors() if client is not None else ()), *others()):
        with contextlib.suppress(OSError):
            os.close(descriptor)


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(close_current_client)
