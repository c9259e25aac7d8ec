"""References to results that may not be there yet."""

import asyncio
import concurrent.futures
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Collection, Generator, Sequence
from typing import Any, ClassVar, Generic, overload

from typing_extensions import TypeVar

from qserve.calls.future import LightFuture
from qserve.errors import CallCancelled, GetTimeoutError

T = TypeVar("T", default=Any)  # so that mypy --strict takes the name alone, which is that of Ray Serve


class Ref(LightFuture[T], Generic[T]):
    """The result of a call: a `concurrent.futures.Future` that can be awaited on any event loop.

    Passed as an argument of another call it is resolved first, without blocking anything. Thread-safe.
    """

    in_forked_child: ClassVar[bool] = False
    """Whether this process was forked from one that makes calls, whose refs it has copies of."""

    is_waited_for = False
    """Whether somebody waits for it now, without a limit of time."""

    @property
    def label(self) -> str:
        """The name of what is called, for messages."""
        return "a call"

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "cancelled" if self.cancelled() else "done"
        return f"<Ref to {self.label}, {state}>"

    def as_argument(self) -> object:
        """Its result as an argument of another call; raises like `result(0)`."""
        return self.result(0)

    def pass_on(self) -> None:
        """Its result will be an argument of another call, so that nobody may need it here."""
        self.refuse_elsewhere()

    def withdraw(self) -> None:
        """Tell the replica that nobody waits for the result any more."""

    def is_forbidden_to_block(self) -> bool:
        """Whether this thread has to receive the result, and so must not wait for it.

        Raises:
            RuntimeError: No thread of this process receives it: see `refuse_elsewhere`.
        """
        return False

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        return "ref", {}

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"{self!r} cannot be pickled, because its result arrives in this process: pass it as an argument of a "
            "call, alone or in a list, tuple or dict; or `await` it, and pickle its result"
        )

    def cancel(self) -> bool:
        """Withdraw the call, which never runs if it still waits. Returns False if it has ended already."""
        if not super().cancel():
            return False
        self.withdraw()
        return True

    @property
    def request_id(self) -> str:
        """The id of the call in logs; "" until it is sent."""
        return ""

    def result(self, timeout: float | None = None, *, timeout_s: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: Seconds to wait at most; None: until the call's own deadline.
            timeout_s: The same, under the name that it has in Ray Serve.

        Raises:
            GetTimeoutError: The result did not arrive in time. The call goes on, and `result` may be called again.
            CallCancelled: The ref was cancelled.
            TaskError: User code raised; also an instance of the class it raised.
            QServeError: What else became of the call.
            RuntimeError: Called where waiting would stop the event loop that has to receive the result.
        """
        self.refuse_to_deadlock()
        if timeout is None:
            timeout = timeout_s
        if timeout is None:
            self.is_waited_for = True
        try:
            return super().result(timeout)
        except concurrent.futures.CancelledError:
            raise CallCancelled(f"the call to {self.label} was cancelled") from None
        except TimeoutError as exc:
            if self.done():
                raise  # the call's own outcome
            raise GetTimeoutError(f"the call to {self.label} did not end within {timeout} s; it goes on") from exc

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like `result`, but returns the error instead of raising it."""
        self.refuse_to_deadlock()
        try:
            return super().exception(timeout)
        except concurrent.futures.CancelledError:
            raise CallCancelled(f"the call to {self.label} was cancelled") from None
        except TimeoutError as exc:
            raise GetTimeoutError(f"the call to {self.label} did not end within {timeout} s; it goes on") from exc

    def __await__(self) -> Generator[Any, None, T]:
        if not self.done():
            if Ref.in_forked_child:
                self.refuse_elsewhere()
            loop = asyncio.get_running_loop()
            woken: asyncio.Future[None] = loop.create_future()
            waker = _waker_of(loop)

            def wake(_ref: object) -> None:
                waker.wake(woken)

            self.tell_when_done(wake)
            self.is_waited_for = True
            try:
                yield from woken
            except BaseException:  # or they would pile up where somebody asks again and again
                self.remove_done_callback(wake)
                raise
            finally:
                self.is_waited_for = False
        if self.raw_result is not None:  # large: it takes a moment
            return (yield from asyncio.get_running_loop().run_in_executor(None, self.result, 0))
        return self.result(0)

    def refuse_elsewhere(self) -> None:
        """Raise RuntimeError in a child that was forked after the call was made: the result arrives in its parent."""
        if Ref.in_forked_child and not self.done():
            self.is_forbidden_to_block()

    def refuse_to_deadlock(self) -> None:
        """Raise RuntimeError where blocking would keep the result from ever arriving."""
        if not self.done() and self.is_forbidden_to_block():
            raise RuntimeError(
                f"waiting for {self.label} here would block the event loop that receives the result: `await` the ref"
            )


class _Waker:
    """Wakes futures of one event loop from other threads. Many futures cost one wake-up of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._thread = threading.get_ident()
        self._ready: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    @property
    def is_own_thread(self) -> bool:
        return threading.get_ident() == self._thread

    def wake(self, future: asyncio.Future[None]) -> None:
        if threading.get_ident() == self._thread:
            _set(future)
            return
        self._ready.append(future)
        loop = self._loop()
        if not self._scheduled and loop is not None and not loop.is_closed():
            self._scheduled = True
            loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        self._scheduled = False
        while self._ready:
            _set(self._ready.popleft())


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_wakers: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker]" = weakref.WeakKeyDictionary()


def _waker_of(loop: asyncio.AbstractEventLoop) -> _Waker:
    waker = _wakers.get(loop)
    if waker is None or not waker.is_own_thread:
        waker = _wakers[loop] = _Waker(loop)
    return waker


@overload
def get(refs: Ref[T], timeout: float | None = None) -> T: ...
@overload
def get(refs: Sequence[Ref[T]], timeout: float | None = None) -> list[T]: ...
def get(refs: Ref[T] | Sequence[Ref[T]], timeout: float | None = None) -> T | list[T]:
    """Wait for one result, or for a list of them in order.

    Args:
        timeout: Seconds for all of them together.

    Raises:
        GetTimeoutError: Some results did not arrive in time; their calls go on.
        Exception: The first error among the results, in the order of the list.
    """
    if isinstance(refs, Ref):
        return refs.result(timeout)
    _check(refs)
    for ref in refs:
        ref.refuse_to_deadlock()
        if timeout is None:
            ref.is_waited_for = True
    if not _wait_for(len(refs), refs, timeout):
        late = sum(not ref.done() for ref in refs)
        raise GetTimeoutError(f"{late} of {len(refs)} calls did not end within {timeout} s; they go on")
    return [ref.result(0) for ref in refs]


def wait(
    refs: Sequence[Ref[T]], num_returns: int = 1, timeout: float | None = None
) -> tuple[list[Ref[T]], list[Ref[T]]]:
    """Wait until some of the calls have ended, well or not.

    Args:
        num_returns: How many to wait for.
        timeout: Seconds to wait at most; fewer than `num_returns` may be ready then.

    Returns:
        (ready, not ready), each in the order given; at most `num_returns` are in the first.
    """
    _check(refs)
    if not refs:  # as a loop that has waited for all of them may ask
        return [], []
    if len(set(refs)) != len(refs):
        raise ValueError("wait() got a ref more than once: give each ref once")
    if not 1 <= num_returns <= len(refs):
        raise ValueError(f"num_returns must be between 1 and {len(refs)}, not {num_returns}")
    for ref in refs:
        ref.refuse_to_deadlock()
    _wait_for(num_returns, refs, timeout)
    ready = [ref for ref in refs if ref.done()][:num_returns]
    chosen = set(ready)
    return ready, [ref for ref in refs if ref not in chosen]


def _wait_for(count: int, refs: Sequence[Ref[Any]], timeout: float | None) -> bool:
    """Block until so many of the refs are done; False if they are not in time.

    A counter and one lock for all of them. `concurrent.futures.wait` makes a condition for each and takes it three
    times, a fifth of what a call costs its caller.
    """
    ended, enough = itertools.count(1), threading.Event()

    def note(_ref: object) -> None:
        if next(ended) == count:  # counted in C, so that no two threads get the same number
            enough.set()

    for ref in refs:
        ref.tell_when_done(note)
    in_time = not count or enough.wait(timeout)
    if not in_time or count < len(refs):
        for ref in refs:  # or they would pile up where somebody asks again and again
            ref.remove_done_callback(note)
    return in_time


def _check(refs: object) -> None:
    if not isinstance(refs, Collection):  # nor a generator, which could be asked for its refs only once
        raise TypeError(f"expected a ref or a list of refs, got {type(refs).__name__}")
    for ref in refs:
        if not isinstance(ref, Ref):
            hint = "; a handle made with sync=False gives the ref when its `remote()` is awaited"
            raise TypeError(f"expected a ref, got {type(ref).__name__}{hint}")
