"""Celery's prefork pool with replicas as its children.

What differs from the stock pool: a child's death is seen by a pidfd, so it is replaced at once and even if a grandchild
holds its pipes; the number of children and their births and deaths belong to the keeper; nothing is forked with
signals open that the child must not miss; and a warm shutdown drains the children within their own limits.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from billiard.pool import RUN, TERMINATE, WorkersJoined
from celery.concurrency import asynpool, prefork
from celery.worker import state as worker_state

from qserve_workers.pool import child_signals
from qserve_workers.pool.child import Child
from qserve_workers.pool.keeper import Keeper
from qserve_workers.user.ordinary_process import end_group

_AGAIN_S = (0.02, 0.2)
"""Where there is no pidfd: when to look again after a child's pipe closed, which happens before it can be reaped."""
_LOOK_S = 0.25
"""How often a shutdown looks at the clock."""
_BACKOFF_S = (0.1, 10.0)


class ChildProcesses(asynpool.AsynPool):  # type: ignore[misc]
    """The child processes. `keeper` is set before the first is forked."""

    Worker = Child

    def __init__(self, *args: Any, keeper: Keeper, **kwargs: Any) -> None:
        self.keeper = keeper
        self._hub: Any = None
        self._signals: tuple[socket.socket, socket.socket] | None = None
        self._pause = 0.0
        self._no_birth_before = 0.0
        # The parent's objects stay as they are: collecting before a fork gets quick, and children share their pages.
        gc.collect()
        gc.freeze()
        super().__init__(*args, **kwargs)

    def register_with_event_loop(self, hub: Any) -> None:
        """Watch children and reports; called again after every reconnect to the broker."""
        self._hub = hub
        super().register_with_event_loop(hub)
        hub.add_reader(self.keeper.fileno(), self.keeper.on_readable)
        self._wake_on_signals(hub)
        self.keeper.resume()
        if self._pause:  # what was to be tried again went with the loop before
            hub.call_later(self._pause, self.maintain_pool)

    def _wake_on_signals(self, hub: Any) -> None:
        """Let signals end the loop's sleep: Python hides from it that one has come."""
        if self._signals is None:
            self._signals = reader, writer = socket.socketpair()
            for each in (reader, writer):
                each.setblocking(False)
            signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        reader, _ = self._signals
        hub.add_reader(reader, reader.recv, 4096)

    # Births

    def WorkerProcess(self, worker: Child) -> Any:  # noqa: N802
        """The process object of a child, which gets to know what it shall run."""
        worker.make_replica = self.keeper.before_birth()
        process = super().WorkerProcess(worker)
        process._controlled_termination = True  # the keeper logs its death, with the deployment's name
        return process

    def on_grow(self, n: int) -> None:
        """Leave the pipes of new children to their births: where there can be no more, that is tried again."""

    def _create_worker_process(self, i: int) -> Any:
        # So that none is lost before the child has its handlers.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, child_signals.ALL)
        before = len(self._pool)
        try:
            super().on_grow(1)
            process = super()._create_worker_process(i)
        except OSError as exc:  # a limit of processes, memory or open files: no reason to end those that run
            for unborn in self._pool[before:]:
                if unborn._popen is not None:
                    raise
                self._pool.remove(unborn)
                self._queues[self._find_worker_queues(unborn)] = None
            self.keeper.on_no_birth(exc)
            self._hold_births()
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self.keeper.after_birth(process.pid)
        return process

    def _repopulate_pool(self, exitcodes: list[int]) -> None:
        pause = self._no_birth_before - time.monotonic()
        if pause > 0:  # they die as soon as they are born; maintain_pool comes back
            return
        for _ in range(self._processes - len(self._pool)):
            if self._state != RUN or self._create_worker_process(self._avail_index()) is None:
                return

    def resize(self, processes: int) -> None:
        """Keep that many children; those beyond it have been told to leave already."""
        if self._state != RUN:
            return
        missing = processes - self._processes
        if missing > 0:
            self.grow(missing)
            self.maintain_pool()
        for _ in range(-missing):
            self._processes -= 1
            self._putlock.shrink()

    # Deaths

    def _track_child_process(self, proc: Any, hub: Any) -> None:
        if getattr(proc, "_sentinel_poll", None) is None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an old kernel; the parent class takes the pipe
                proc._sentinel_poll = os.pidfd_open(proc.pid)
        super()._track_child_process(proc, hub)

    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        super()._event_process_exit(hub, proc)
        if proc in self._pool:
            for delay in _AGAIN_S:
                hub.call_later(delay, self.maintain_pool)

    def _join_exited_workers(self, shutdown: bool = False) -> list[int]:
        before = {process.pid: process for process in self._pool}
        exitcodes: list[int] = super()._join_exited_workers(shutdown=shutdown)
        for process in self._pool:
            before.pop(process.pid, None)
        for pid, process in before.items():
            end_group(pid)
            if not self.keeper.on_death(pid, process.exitcode):
                self._hold_births()
        return exitcodes

    def _hold_births(self) -> None:
        """Something is wrong with this machine, this installation or Redis: children end before they construct
        anything, or cannot be started."""
        now = time.monotonic()
        if now - self._no_birth_before > _BACKOFF_S[1]:  # the last time is long ago
            self._pause = 0.0
        self._pause = min(_BACKOFF_S[1], self._pause * 2 or _BACKOFF_S[0])
        self._no_birth_before = now + self._pause
        if self._hub is not None:
            self._hub.call_later(self._pause, self.maintain_pool)

    # The end

    def drain(self) -> None:
        """Let all children finish their calls and leave; returns when they have. A cold shutdown cuts it short."""
        self.keeper.rollout.close()
        self.keeper.act()
        while self._pool and worker_state.should_terminate in (None, False):
            poll = select.poll()
            poll.register(self.keeper.fileno(), select.POLLIN)
            for process in self._pool:
                poll.register(process._sentinel_poll or process._popen.sentinel, select.POLLIN)
            poll.poll(_LOOK_S * 1000)
            self.keeper.on_readable()
            self.reap()

    def kill(self) -> None:
        """End all children now."""
        for process in self._pool:
            if process._is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self._pool:
            process._popen.wait()
        self.reap()

    def reap(self) -> None:
        """Bury the children that have ended, without replacing them."""
        with contextlib.suppress(WorkersJoined):
            self._join_exited_workers(shutdown=True)


class ReplicaPool(prefork.TaskPool):  # type: ignore[misc]
    """What Celery sees as its pool (`worker_pool`)."""

    Pool = ChildProcesses

    keeper: Keeper
    hub: Any
    """Both set by the worker before it starts the pool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pool: Any = None
        self._draining = False
        super().__init__(*args, **kwargs)

    def on_start(self) -> None:
        """Fork the first children."""
        self.keeper.start()
        self.options["keeper"] = self.keeper
        super().on_start()

    def did_start_ok(self) -> bool:
        """Yes: a replica that has ended already is a matter for the rollout, not a reason to give up."""
        return True

    def call_later(self, delay: float, function: Callable[[], None]) -> Any:
        """Run a function on Celery's event loop after some seconds."""
        return self.hub.call_later(delay, function)

    def resize(self, processes: int) -> None:
        """Keep that many children."""
        if self._pool is not None:
            self._pool.resize(processes)

    def on_stop(self) -> None:
        """Warm shutdown: drain, then close. Called again, by the signal of a cold one, it lets the first go on."""
        if self._pool is not None and not self._draining:
            self._draining = True
            self._pool.close()
            self._pool.drain()
            self._end()

    def on_terminate(self) -> None:
        """Cold shutdown: kill, and tell whose calls are free to take."""
        if self._pool is not None:
            self._end()

    def _end(self) -> None:
        self._pool._state = TERMINATE
        self._pool.kill()
        self._pool.terminate()
        self._pool = None
        self.hub.remove(self.keeper.fileno())
        self.keeper.stop()
