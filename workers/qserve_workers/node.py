"""`python -m qserve_workers.node`: this machine's share of an instance.

A node reads what is deployed and keeps one Celery worker per deployment running, and a gateway where it is told to. It
imports neither user code nor Celery.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from qserve.background import end
from qserve.broker.instance.change_log import Change, Snapshot, connect_asyncio, follow, has_schedules, read_snapshot
from qserve.broker.instance.drained_nodes import read_drained
from qserve.broker.instance.remembered_state import RememberedState
from qserve.broker.instance.reports import forget_dead, report_node, withdraw_node
from qserve.broker.instance.state import State
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import embedded
from qserve.broker.server.redis_checks import require_usable_at
from qserve.deployments import deploying
from qserve.deployments.alive_files import SAY_EVERY_S, AliveFile
from qserve.deployments.local_instance import InstanceRecord
from qserve.errors import BrokerUnavailable, ConfigurationError, QServeError
from qserve.settings import Settings
from qserve.telemetry.log_records import log_to_stderr
from qserve.this_machine import machine_errors, started_at
from qserve.wire.messages import Signer
from qserve.wire.spec import EVERY_NODE, HEALTHY, NodeInfo
from qserve_workers.children import Orphans, can_adopt, program
from qserve_workers.node_gateways import NodeGateways
from qserve_workers.node_options import NodeOptions, child_environment, parse
from qserve_workers.node_sleepers import Sleepers
from qserve_workers.node_template import FirstTemplate, Template
from qserve_workers.node_workers import STOP_MARGIN_S, NodeWorkers
from qserve_workers.supervise import KeptProcess
from qserve_workers.titles import KEEPS_ENVIRONMENT

logger = logging.getLogger("qserve.node")

_TICK_S = (1.0, 5.0)
"""How often it is looked at the state without being told of a change: while something is on its way, and else."""
_READ_ALL_EVERY_S = 60.0
"""What many deployments cost does so not grow with every node."""
_POLL_S = 0.02
_VALKEY_POLL_S = 0.003
_BEAT_GRACE_S = 3.0
_SCHEDULER = "qserve_workers.beat:Scheduler"


@dataclass(frozen=True)
class NodeBirth:
    """What a node is told by the process that it was forked from, `qserve_workers.instance_process`.

    Attributes:
        id: Its own.
        keeper: Pid of that process; None for a node that nobody holds.
        predecessor: Id of the node that was killed before it; "" for the first one.
        descriptor: A socket on which its gateway is to listen; None: on one of its own.
        template: The template that it begins with; None: it starts one.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    keeper: int | None = None
    predecessor: str = ""
    descriptor: int | None = None
    template: FirstTemplate | None = None


class Node:
    """One node, from start to exit."""

    def __init__(self, options: NodeOptions, settings: Settings, birth: NodeBirth | None = None) -> None:
        self._birth = birth or NodeBirth()
        self.id = self._birth.id
        self._options = options
        self._folder = options.folder or Path(tempfile.mkdtemp(prefix="qserve-node-"))
        self._settings = settings
        self._keys = settings.keys
        self._signer = Signer(settings.secrets)
        self._redis = connect_asyncio(settings.redis_url)
        self._state = State(settings.redis_url, settings.keys, self._signer)
        self._snapshot = Snapshot()
        self._changes: list[Change] = []
        self._read_all_at = 0.0
        self._drained = ""
        self._remembered = RememberedState(self._keys, self._signer, restores=settings.autorestore)
        self._gateways: NodeGateways | None = None
        self._beside: asyncio.Task[None] | None = None
        self._beat: KeptProcess | None = None
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._force = asyncio.Event()
        self._environment = child_environment(options, settings, self.id)
        self._template = Template(os.environ | self._environment, self._birth.template) if can_adopt() else None
        self._orphans = Orphans()
        self._sleepers = Sleepers(self._redis, self._keys)
        self._workers = NodeWorkers(
            *(self.id, options, settings, self._environment, self._redis, self._template),
            changed=self._changed,
            force=self._force,
        )
        self._exit_code = 0

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or until the owner is gone; returns the exit code."""
        self._watch_signals()
        if self._template is not None:
            self._template.start()
        tasks = [asyncio.create_task(self._watch_owner()), asyncio.create_task(self._say_alive())]
        try:
            await (self._wait_for_valkey() if self._options.embedded else self._find_redis())
            self._write_instance_file(ready=False)
            tasks += [
                asyncio.create_task(step)
                for step in (self._serve_http(), self._follow(), self._keep_in_step(), self._sleepers.run())
            ]
            for task in tasks:
                task.add_done_callback(self._on_task_end)
            await self._stopping.wait()
        finally:
            await end(*tasks, self._beside)
            await self._stop()
        return self._exit_code

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("Stopping after an unexpected error.", exc_info=task.exception())
            self._exit_code = 1
            self._stopping.set()

    # Signals and the owner

    def _watch_signals(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal)

    def _on_signal(self) -> None:
        if self._stopping.is_set() or self._is_orphan():
            self._force.set()
        self._stopping.set()

    def _is_orphan(self) -> bool:
        """Whether who held the instance together is gone, and the embedded Valkey with it: nothing can be drained."""
        return self._birth.keeper is not None and os.getppid() != self._birth.keeper

    async def _say_alive(self) -> None:
        file = AliveFile(self._settings.namespace, "node")
        try:
            while True:
                file.touch()
                await asyncio.sleep(SAY_EVERY_S)
        finally:
            file.remove()

    async def _watch_owner(self) -> None:
        owner = self._options.owner
        if owner is None:
            return
        await _wait_for_end(owner)
        logger.info("The process that started this instance has ended; stopping.")
        self._stopping.set()

    # Redis

    async def _find_redis(self) -> None:
        """Wait for a Redis that answers, and refuse one that calls would be lost on."""
        told = False
        while not self._stopping.is_set():
            try:
                return await asyncio.to_thread(require_usable_at, self._settings.redis_url)
            except ConfigurationError as exc:
                return self._fail("%s", exc)
            except BrokerUnavailable as exc:
                if not told:
                    logger.warning("%s Trying again until it answers.", exc)
                told = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _TICK_S[0])
        return None

    async def _wait_for_valkey(self) -> None:
        while not self._stopping.is_set() and not _accepts(embedded.socket_path(self._folder)):  # noqa: ASYNC110
            await asyncio.sleep(_VALKEY_POLL_S)

    def _fail(self, message: str, *args: object) -> None:
        logger.error(message, *args)
        self._exit_code = 1
        self._stopping.set()

    # HTTP

    async def _serve_http(self) -> None:
        """Keep the gateways running, if there are to be any; the instance file says when they listen."""
        url = ""
        if self._options.gateway:
            shares_port = _location(self._options.http) == EVERY_NODE
            url = await self._start_gateways(
                shares_port=shares_port, on_failure=lambda why: self._fail("The gateway cannot start: %s", why)
            )
        self._write_instance_file(ready=True, gateway_url=url)

    async def _serve_http_beside(self) -> None:
        """Keep gateways that nobody asked this very node for."""
        url = await self._start_gateways(
            shares_port=True,
            on_failure=lambda why: logger.error("The gateway beside this node cannot start, will try again: %s", why),
        )
        self._write_instance_file(ready=True, gateway_url=url)

    async def _start_gateways(self, *, shares_port: bool, on_failure: Callable[[str], None]) -> str:
        self._gateways = NodeGateways(
            *(self._options, self._settings, self._folder, self._environment, self._template),
            descriptor=self._birth.descriptor,
            shares_port=shares_port,
            on_failure=on_failure,
        )
        return await self._gateways.start()

    def _write_instance_file(self, *, ready: bool, gateway_url: str = "") -> None:
        path = self._options.instance_file
        if path is None or self._stopping.is_set():
            return
        pid = self._birth.keeper or os.getpid()
        record = InstanceRecord(
            namespace=self._settings.namespace,
            redis_url=self._settings.redis_url,
            secret=self._settings.secret,
            pid=pid,
            started=started_at(pid),
            node=self.id,
            folder=str(self._folder),
            ready=ready,
            gateway_url=gateway_url,
            console_url=self._gateways.console_url if self._gateways is not None else "",
            http=msgspec.json.decode(self._options.http),
            detached=self._options.owner is None,
            log_file=str(self._options.log_file or ""),
        )
        draft = path.with_suffix(f".{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(path)

    def _match_gateways(self) -> None:
        """Start the gateways of an instance that has them beside every node."""
        if self._options.gateway is None and self._beside is None and self._snapshot.http.location == EVERY_NODE:
            self._beside = asyncio.create_task(self._serve_http_beside())
            self._beside.add_done_callback(self._on_task_end)

    # Workers

    async def _follow(self) -> None:
        self._snapshot = await self._read_state()
        self._changed.set()
        async for change in follow(self._settings.redis_url, self._keys, self._snapshot.log_id):
            self._changes.append(change)
            self._changed.set()

    async def _catch_up(self) -> Snapshot:
        """The state as it is now: what has changed is read and what is on its way, and now and then all of it."""
        changes, self._changes = self._changes, []
        unsettled = [name for name, d in self._snapshot.deployments.items() if d.state != HEALTHY]
        now = time.monotonic()
        if now < self._read_all_at:
            with contextlib.suppress(QServeError):
                known = await self._remembered.after(self._redis, changes, unsettled)
                if known is not None:
                    return known
        self._read_all_at = now + _READ_ALL_EVERY_S
        return await self._read_state()

    async def _read_state(self) -> Snapshot:
        told = ""
        while True:
            try:
                found = await read_snapshot(self._redis, self._keys, self._signer)
                return await self._remembered.compare(self._redis, found)
            except QServeError as exc:
                if str(exc) != told:  # once for each reason, not each second
                    told = str(exc)
                    logger.warning("Cannot read the state, trying again: %s", told)
                await asyncio.sleep(_TICK_S[0])

    async def _keep_in_step(self) -> None:
        """Announce this node, and start and stop workers after every change; now and then without one, too."""
        if self._birth.predecessor:  # which was killed: nobody is to wait for it, and its workers leave by themselves
            await self._withdraw(self._birth.predecessor)
        with contextlib.suppress(QServeError, CommandRefused):
            await forget_dead(self._redis, self._keys)
        while True:
            self._changed.clear()
            self._orphans.reap()
            await self._announce()
            self._snapshot = await self._catch_up()
            self._workers.match(self._snapshot, drained=bool(self._drained))
            self._sleepers.match(self._snapshot.deployments)
            self._match_gateways()
            await self._match_beat()
            if unsettled := [name for name, d in self._snapshot.deployments.items() if d.state != HEALTHY]:
                await asyncio.to_thread(self._settle, unsettled)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _TICK_S[0 if unsettled else 1])

    async def _match_beat(self) -> None:
        """Run Celery's beat while anything is scheduled; every node does, and each call is submitted once."""
        try:
            wanted = await has_schedules(self._redis, self._keys)
        except (QServeError, CommandRefused):
            return
        if wanted and self._beat is None:
            command = [sys.executable, "-m", "celery", "-A", "qserve_workers", "-q", "beat", "-S", _SCHEDULER]
            command += ["--loglevel", self._settings.log_level]
            self._beat = KeptProcess(
                "beat", program(lambda: command, os.environ | self._environment | {KEEPS_ENVIRONMENT: "1"})
            )
            self._beat.start()
        elif not wanted and self._beat is not None:
            beat, self._beat = self._beat, None
            await beat.stop(_BEAT_GRACE_S, self._force)

    # What others see of this node, and want of it

    async def _announce(self) -> None:
        try:
            drained = await read_drained(self._redis, self._keys, self.id)
            if bool(drained) != bool(self._drained):
                logger.info("This node is %s", "drained: its replicas leave" if drained else "no longer drained")
            self._drained = drained
            info = NodeInfo(
                id=self.id,
                host=socket.gethostname(),
                pid=os.getpid(),
                only=self._options.only,
                replicas_per_node=self._options.replicas_per_node,
                drained=drained,
            )
            await report_node(self._redis, self._keys, info)
        except (QServeError, CommandRefused) as exc:
            logger.warning("Cannot announce this node: %s", exc)

    async def _withdraw(self, node: str) -> None:
        with contextlib.suppress(QServeError, CommandRefused):
            await withdraw_node(self._redis, self._keys, node)

    def _settle(self, names: list[str]) -> None:
        for name in names:
            try:
                deploying.settle(self._state, name)
            except QServeError as exc:
                logger.warning("Cannot judge deployment '%s': %s", name, exc)

    # The end

    async def _stop(self) -> None:
        """Stop what was started: first what brings calls in, then what answers them, then the queue between them."""
        logger.info("Stopping.")
        await self._withdraw(self.id)
        if self._beat is not None:
            await self._beat.stop(_BEAT_GRACE_S, self._force)
        if self._gateways is not None:
            await self._gateways.stop(self._workers.longest_grace_s + STOP_MARGIN_S, self._force)
        await self._workers.stop()
        if self._template is not None:
            await self._template.stop(self._force)
        self._state.close()
        await self._redis.aclose()
        if self._exit_code == 0 and self._birth.keeper is None:  # else the logs stay, or the next node needs it
            shutil.rmtree(self._folder, ignore_errors=True)


async def _wait_for_end(pid: int) -> None:
    """Until our parent `pid` has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, an old kernel, or it is gone already
        while os.getppid() == pid:  # noqa: ASYNC110 nothing tells us
            await asyncio.sleep(_POLL_S * 10)
        return
    try:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


def _location(http: str) -> object:
    options: dict[str, object] = msgspec.json.decode(http)
    return options.get("location")


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def main() -> int:
    """Run the node of this command line and environment."""
    options = parse(sys.argv[1:], __doc__)
    try:
        settings = Settings()
    except ConfigurationError as exc:
        sys.exit(str(exc))
    log_to_stderr("node", settings.log_level, settings.log_format)
    if os.geteuid() == 0:
        logger.warning("This node runs as root, and so does the code of every deployment.")
    try:
        with machine_errors():
            return asyncio.run(Node(options, settings).run())
    except ConfigurationError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    sys.exit(main())
