"""`python -m qserve_workers.instance_process`: the process that holds an instance on this machine together.

It owns the embedded Valkey, the socket on which the gateway listens, and the node, which is forked from it and owns
everything else. It imports once what all of them need: node, template, gateway and workers share that memory. When one
of them is killed, it is started again: a node that follows another one finds the server and the socket where they were,
and what has been deployed. It does nothing else, so there is little that could end it; if it is killed all the same,
everything ends.
"""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from qserve.broker.server import embedded
from qserve.deployments.data_folder import DataFolder
from qserve.deployments.head_start import WAITS, wait_for_orders
from qserve.deployments.local_instance import InstanceRecord, listening_socket
from qserve.deployments.log_files import rotate_if_long
from qserve.errors import ConfigurationError
from qserve.settings import Settings
from qserve.telemetry.log_records import log_to_stderr
from qserve.this_machine import machine_errors
from qserve.wire.spec import EVERY_NODE
from qserve_workers.children import (
    adopt_orphans,
    can_adopt,
    children_of,
    die_with_parent,
    processes_of_session,
    start_program,
)
from qserve_workers.node import Node, NodeBirth
from qserve_workers.node_options import NodeOptions, child_environment, parse
from qserve_workers.node_template import FirstTemplate
from qserve_workers.supervise import BACKOFF_S, reason_of
from qserve_workers.template import fork_template, import_everything, import_for_some, serve
from qserve_workers.titles import find_title, set_title

logger = logging.getLogger("qserve.instance")

_WATCHED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
_LOOK_S = 5.0
_GOOD_RUN_S = 10.0
"""What ran this long is started again without much delay."""
_LEFT_OVER_S = 30.0
"""How long what a killed node has left behind may take to finish its calls."""
_VALKEY_S = 3.0
_KEPT = "It reads its data from disk: durable calls and schedules are there again."
_UNREADABLE = (
    "\nIts data is in %s, and was not changed. If a newer server wrote it, install that one; if it is damaged, "
    "`valkey-check-aof` tells where; or name another folder with --data."
)
_LOST = (
    "Durable calls and schedules are lost: this server keeps nothing on disk. Where that matters, give `qserve run` a "
    "folder with --data, or name a server that keeps its data in QSERVE_REDIS_URL."
)


class _Part:
    """The node, or the Valkey: when it was started, and when it is to be started again."""

    def __init__(self) -> None:
        self.pid = 0
        self.due: float | None = 0.0
        self._since = 0.0
        self._delay = BACKOFF_S[0]

    def started(self, pid: int) -> None:
        self.pid, self.due, self._since = pid, None, time.monotonic()

    def ended(self) -> float:
        """Say that it has ended; returns in how many seconds it is due again."""
        now = time.monotonic()
        if self.has_run_well:
            self._delay = BACKOFF_S[0]
        delay, self._delay = self._delay, min(2 * self._delay, BACKOFF_S[1])
        self.pid, self.due = 0, now + delay
        return delay

    @property
    def has_run_well(self) -> bool:
        return time.monotonic() - self._since > _GOOD_RUN_S

    def is_due(self) -> bool:
        return self.due is not None and self.due <= time.monotonic()


class InstanceProcess:
    """Holds one instance together, from start to exit.

    It has no event loop and no thread, so that it can fork nodes at any time.
    """

    def __init__(self, options: NodeOptions, settings: Settings, folder: Path) -> None:
        self._options = options
        self._settings = settings
        self._folder = folder
        self._node, self._valkey = _Part(), _Part()
        if not options.embedded:
            self._valkey.due = None
        self._socket: socket.socket | None = None
        self._last_node = ""
        self._data = DataFolder(options.data) if options.data is not None else None
        self._left_over: set[int] = set()
        self._is_stopping = self._is_forced = False
        self._exit_code = 0

    def run(self) -> int | NodeBirth:
        """Hold it together until SIGTERM or SIGINT, or until the node ends by itself.

        Returns:
            The exit code; in a process that was forked to be a node, what it is to know.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        if sys.platform.startswith("linux"):
            adopt_orphans()
        try:
            self._listen()
            if self._data is not None:
                self._data.hold()
                self._last_node = self._data.last_node
            gc.freeze()  # what nodes share stays shared
            while not self._is_stopping or self._node.pid:
                if self._valkey.is_due():
                    self._start_valkey()
                if self._node.is_due() and not self._is_stopping:
                    birth = self._fork_node()
                    if birth is not None:
                        return birth
                self._wait_for_something()
        except ConfigurationError as exc:
            self._fail("%s", exc)
        self._finish()
        return self._exit_code

    def _listen(self) -> None:
        """Listen for the gateway, so that what comes while it is away waits, and its port stays ours."""
        options = self._options
        if options.gateway and options.gateway_workers == 1 and _location(options.http) != EVERY_NODE:
            try:
                self._socket = listening_socket(options.host, options.port)
            except ValueError as exc:
                raise ConfigurationError(f"The gateway cannot start: {exc}") from exc

    def _start_valkey(self) -> None:
        command = embedded.command(self._folder, self._options.data)
        self._valkey.started(start_program(command, death_signal=signal.SIGKILL))

    def _fork_node(self) -> NodeBirth | None:
        keeper = os.getpid()
        birth = NodeBirth(secrets.token_hex(16), keeper, self._last_node)
        pid = os.fork()
        if pid:
            self._node.started(pid)
            self._last_node = birth.id
            if self._data is not None:
                with contextlib.suppress(ConfigurationError):  # the next run then waits until this node counts as gone
                    self._data.note_node(birth.id)
            return None
        if sys.platform.startswith("linux"):
            die_with_parent(keeper, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        return replace(birth, descriptor=self._socket.detach() if self._socket is not None else None)

    # What happens

    def _wait_for_something(self) -> None:
        due = [part.due for part in (self._node, self._valkey) if part.due is not None]
        until = min(due, default=time.monotonic() + _LOOK_S)
        what = signal.sigtimedwait(_WATCHED, max(0.0, until - time.monotonic()))
        if what is not None and what.si_signo != signal.SIGCHLD:
            self._is_forced = self._is_stopping
            self._stop_node()
        self._reap()
        if self._options.log_file is not None:
            with contextlib.suppress(OSError):  # it stays as it is meanwhile
                rotate_if_long(self._options.log_file)

    def _stop_node(self) -> None:
        self._is_stopping = True
        if self._node.pid:
            os.kill(self._node.pid, signal.SIGTERM)

    def _fail(self, message: str, *arguments: object) -> None:
        logger.error(message, *arguments)
        self._exit_code = 1
        self._stop_node()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._node.pid:
                self._on_node_end(pid, code)
            elif pid == self._valkey.pid:
                self._on_valkey_end(pid, code)
            elif pid in self._left_over:
                self._left_over.discard(pid)
                _kill_session(pid)

    def _on_node_end(self, pid: int, code: int) -> None:
        delay = self._node.ended()
        if code >= 0:  # it was told to, or has said why
            self._is_stopping, self._exit_code = True, self._exit_code or code
        elif not self._is_stopping:
            self._left_over |= set(children_of(os.getpid())) - {self._valkey.pid}
            logger.error(
                "The node of this instance (pid %d) was %s. The next one starts in %.1f s, with new workers and a new "
                "gateway; the old ones finish the calls that they have and leave, and what waits in the queues waits.",
                *(pid, reason_of(code), delay),
            )

    def _on_valkey_end(self, pid: int, code: int) -> None:
        cannot_read = self._data is not None and code > 0 and not self._valkey.has_run_well
        delay = self._valkey.ended()
        if self._is_stopping:
            return
        if cannot_read or not self._has_been_up():  # it takes connections before it has read all of its data
            log = embedded.log_path(self._folder)
            said = log.read_text().strip() if log.exists() else "no log"
            hint = "" if self._data is None else _UNREADABLE % self._data.path
            self._fail("Valkey did not start (%s): %s%s", reason_of(code), said, hint)
            return
        logger.error(
            "The embedded Valkey (pid %d) ended (%s); it is started again in %.1f s. What is deployed is put back, and "
            "calls in flight end as after any failure of Redis. %s",
            *(pid, reason_of(code), delay, _KEPT if self._data is not None else _LOST),
        )

    def _has_been_up(self) -> bool:
        """A node tells of the instance as soon as its server answers."""
        path = self._options.instance_file
        return path is not None and _tells_of_us(path)

    # The end

    def _finish(self) -> None:
        """Stop what the last node has not stopped, then the queue."""
        if self._socket is not None:
            self._socket.close()
        deadline = time.monotonic() + _LEFT_OVER_S
        while self._left_over and not self._is_forced and time.monotonic() < deadline:
            self._wait_for_something()
        for pid in self._left_over:
            _kill_session(pid)
        if self._valkey.pid:
            self._stop_valkey(self._valkey.pid)
        path = self._options.instance_file
        if path is not None and _tells_of_us(path):
            path.unlink(missing_ok=True)
        if self._exit_code == 0:  # else the logs stay
            shutil.rmtree(self._folder, ignore_errors=True)

    def _stop_valkey(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _VALKEY_S
        while self._valkey.pid and (left := deadline - time.monotonic()) > 0:
            signal.sigtimedwait({signal.SIGCHLD}, left)
            self._reap()
        if self._valkey.pid:
            os.kill(pid, signal.SIGKILL)


def _kill_session(leader: int) -> None:
    """End a process and what it has started."""
    for pid in (leader, *processes_of_session(leader)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _tells_of_us(path: Path) -> bool:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=InstanceRecord).pid == os.getpid()
    return False


def _location(http: str) -> object:
    options: dict[str, object] = msgspec.json.decode(http)
    return options.get("location")


def main() -> int:
    """Hold the instance of this command line and environment together, or of those that it is told."""
    if sys.argv[1:2] == [WAITS]:
        find_title()
        import_everything(gateway=True)
        if not wait_for_orders(import_for_some):
            return 0
    options = parse(sys.argv[1:], __doc__)
    try:
        settings = Settings()
    except ConfigurationError as exc:
        sys.exit(str(exc))
    assert options.folder is not None
    import_everything(options.imports, gateway=options.gateway is True)
    gc.enable()
    log_to_stderr("node", settings.log_level, settings.log_format)
    if os.geteuid() == 0:
        logger.warning("This node runs as root, and so does the code of every deployment.")
    outcome = InstanceProcess(options, settings, options.folder).run()
    return outcome if isinstance(outcome, int) else _be_node(options, settings, outcome)


def _be_node(options: NodeOptions, settings: Settings, birth: NodeBirth) -> int:
    if can_adopt():
        template = fork_template(child_environment(options, settings, birth.id), birth.descriptor)
        if not isinstance(template, FirstTemplate):
            serve(template)
            return 0
        birth = replace(birth, template=template)
    set_title("qserve: node")
    try:
        with machine_errors():
            return asyncio.run(Node(options, settings, birth).run())
    except ConfigurationError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    sys.exit(main())
