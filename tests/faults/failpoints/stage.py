"""One deployment in a namespace of its own: who calls it, who dies, who survives, and what was run."""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery

from qserve.broker.instance.heartbeats import DIED, post_tombstone
from qserve.broker.instance.state import State
from qserve.broker.keys import GROUP
from qserve.broker.large.lending import Lending
from qserve.broker.server.redis_clients import client
from qserve.calls.stream_call import StreamCall
from qserve.calls.streams import ResultStream
from qserve.deployments.loading import load_target
from qserve.durable.watching import CallWatcher
from qserve.errors import QServeError, TaskError
from qserve.failpoints import VARIABLE
from qserve.settings import Settings, at_deployment
from qserve.wire.call_record import DurableOptions
from qserve.wire.codec import Codec
from qserve.wire.messages import PYTHON, STREAM, Outcome, Reply, Signer
from qserve.wire.spec import DeploymentSpec, Target
from qserve_workers.calls.consumer import Consumer
from qserve_workers.calls.takeover import Takeover
from qserve_workers.celery_app import broker_settings
from qserve_workers.celery_calls.celery_queue import QUEUE
from qserve_workers.celery_calls.celery_tasks import TASK
from qserve_workers.user.user_code import UserCode
from tests.faults.failpoints.work import LARGE
from tests.support.calling import Caller
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import until

NAME = "Work"
GHOST = "ghost"
LIMIT_S = 60.0
_FOREVER = re.compile("meta|deployments|log|q|hb|replicas|workers|gateways|counters|instance|dead|call|troubles")
"""Kinds of keys that need not expire: what is deployed, and what lives as long as it."""
_codec = Codec(allow_pickle=True, max_bytes=2**24)


def work_spec(folder: str, revision: str = "1", **changes: Any) -> DeploymentSpec:
    """What is deployed."""
    return DeploymentSpec(
        name=NAME,
        target=Target("tests.faults.failpoints.work:Work", sys_path=(str(ROOT),)),
        revision=revision,
        init_args=_codec.pack_call((folder,), {}),
        route_prefix="/work",
        num_replicas=1,
        **changes,
    )


class Said(NamedTuple):
    """How a call ended: its result, or the name of its error."""

    value: Any
    error: str = ""


class Victim:
    """A process that is to die of its failpoint."""

    def __init__(self, process: "subprocess.Popen[bytes]", reports: Path, log: Path) -> None:
        self.process = process
        self._reports = reports
        self.log = log

    @property
    def id(self) -> str:
        """Of the replica that it is, "" if it did not come to tell."""
        lines = [json.loads(line) for line in self._reports.read_text().splitlines() if line.startswith("{")]
        return next((str(line["replica"]) for line in lines if line["event"] == "state"), "")

    async def died(self) -> None:
        """Wait until it has, of the failpoint and nothing else."""
        await self.ended()
        assert self.process.returncode == -signal.SIGKILL, f"{self.process.returncode}: {self.log.read_text()}"
        assert "failpoint" in self.log.read_text()

    async def ended(self) -> None:
        """Wait until it has."""
        await asyncio.wait_for(asyncio.to_thread(self.process.wait, patience(LIMIT_S)), patience(LIMIT_S))


class Stage:
    """The deployment. Use as an asynchronous context."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(
            redis_url=redis_url,
            secret=secrets.token_hex(16),
            namespace=f"stage-{secrets.token_hex(4)}",
            beat_interval_s=0.2,
            dead_after_s=patience(1.5),
            celery_calls=True,
        )
        self.keys = self.settings.keys.of(NAME)
        self.signer = Signer(self.settings.secrets)
        self.redis = client(redis_url, patience(20))
        self.state = State(redis_url, self.settings.keys, self.signer)
        self._processes: list[Victim] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Stage":
        self.state.deploy(work_spec(str(self.folder)), expected=0)
        self.caller = Caller(self.settings, NAME)
        await self.caller.client.start()
        self._stack.push_async_callback(self.caller.client.stop)
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in self._processes:
            each.process.kill()
        for each in self._processes:
            await asyncio.to_thread(each.process.wait)
        await self._stack.aclose()
        for keys in dict.fromkeys((self.keys, self.settings.keys)):
            for key in self.redis.scan_iter(keys.base + "*"):
                self.redis.delete(key)
        self.state.close()
        self.redis.close()

    # Processes

    def spawn(self, *arguments: str, failpoint: str = "") -> Victim:
        """Start `python -m ARGUMENTS`, which dies where it is told to."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}
        for name, value in self.settings.model_dump(exclude_defaults=True).items():
            environment[f"QSERVE_{name.upper()}"] = str(value)
        environment["QSERVE_RUNTIME_DIR"] = str(self.folder)
        if failpoint:
            environment[VARIABLE] = failpoint
        out = self.folder / f"out-{len(self._processes)}"
        log = out.with_suffix(".log")
        with out.open("wb") as stdout, log.open("wb") as stderr:
            command = [sys.executable, "-m", *arguments]
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stdout, stderr=stderr)
        victim = Victim(process, out, log)
        self._processes.append(victim)
        return victim

    def replica(self, failpoint: str) -> Victim:
        """A replica that dies there."""
        return self.spawn("tests.support.replica_host", NAME, failpoint=failpoint)

    def bury(self, victim: Victim) -> None:
        """What a worker does when it has seen its replica die."""
        if victim.id:
            post_tombstone(self.redis, self.keys, NAME, victim.id, self.signer)

    def haunt(self, deliveries: int = 1) -> None:
        """Let a replica take all that is queued and die of it; it may have done so before with others.

        Args:
            deliveries: How often the calls have been started.
        """
        stream = self.keys.calls(NAME)
        read: Any = self.redis.xreadgroup(GROUP, GHOST, {stream: ">"})
        for _, entries in read:
            ids = [entry for entry, _ in entries]
            self.redis.xclaim(stream, GROUP, GHOST, 0, ids, retrycount=2 * deliveries - 1)
        self.redis.hset(self.keys.heartbeats(NAME), GHOST, DIED)

    @asynccontextmanager
    async def survivor(self) -> AsyncIterator[Consumer]:
        """A replica in this process, which does not die."""
        replica = secrets.token_hex(16)
        spec = work_spec(str(self.folder))
        code = UserCode(spec, load_target(spec.target), "survivor", _codec)
        await code.construct()
        settings = at_deployment(self.settings, NAME)
        lending = Lending(replica, self.keys.address(settings.redis_url), self.keys, self.signer)
        consumer = Consumer(settings, self.signer, _codec, spec, replica, lending)
        await consumer.connect()
        takeover = Takeover(settings, consumer, replica)
        takeover.start()
        consumer.start(code)
        try:
            yield consumer
        finally:
            await takeover.stop()
            await consumer.pause()
            await consumer.stop()
            lending.stop()
            await code.close()

    # Calls

    def call(self, method: str = "work", *, safe: bool = False, large: bool = False) -> Awaitable[Said]:
        """Put a call; named like its method, it notes its runs under that."""
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        client = self.caller.client
        pending = client.prepare(
            NAME,
            kind=PYTHON,
            method=method,
            payload=_codec.pack_call((method, bytes(LARGE)) if large else (method,), {}),
            timeout_s=patience(LIMIT_S),
            safe=safe,
            on_outcome=ended.set_result,
        )
        client.put(pending)
        return asyncio.ensure_future(self._said(ended))

    def stream(self) -> Awaitable[Said]:
        """Put a call whose result comes in parts."""
        client = self.caller.client

        def prepare(payload: Any, on_outcome: Any) -> Any:
            return client.prepare(
                NAME,
                kind=STREAM,
                method="parts",
                payload=payload,
                timeout_s=patience(LIMIT_S),
                safe=False,
                on_outcome=on_outcome,
            )

        call = StreamCall(client, self.caller.codec, prepare, NAME, None)
        call.send(_codec.pack_call(("parts",), {}))
        parts: ResultStream[int] = ResultStream(client, call)

        async def read() -> Said:
            got: list[int] = []
            try:
                async for part in parts:
                    got.append(part)  # noqa: PERF401 what came before the error counts
            except QServeError as exc:
                return Said(got, type(exc).__name__)
            return Said(got)

        return asyncio.wait_for(read(), patience(LIMIT_S))

    async def submit(self, method: str = "work", options: DurableOptions | None = None) -> tuple[str, Awaitable[Said]]:
        """Submit a durable call; its id, and how it will end."""
        durable = self.caller.client.durable
        admitted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        submission = durable.submissions.prepare(
            NAME,
            kind=PYTHON,
            method=method,
            payload=_codec.pack_call((method,), {}),
            options=options or DurableOptions(),
            on_admitted=admitted.set_result,
        )
        durable.watchers.watch(submission.call.id, CallWatcher(ended.set_result, lambda _: None))
        durable.submissions.submit(submission)
        call_id = await admitted
        assert isinstance(call_id, str), call_id
        return call_id, asyncio.ensure_future(self._said(ended))

    async def send_task(self, method: str = "work") -> str:
        """Have a Celery client send a task; its id."""
        found = broker_settings(self.settings.redis_url)
        found["broker_transport_options"]["global_keyprefix"] = self.settings.keys.celery_prefix
        with Celery(set_as_current=False) as app:
            app.conf.update(found)
            task = await asyncio.to_thread(app.send_task, TASK, [NAME, method, [method]], queue=QUEUE)
        return str(task.id)

    async def _said(self, ended: "asyncio.Future[Outcome]") -> Said:
        outcome = await asyncio.wait_for(ended, patience(LIMIT_S))
        assert isinstance(outcome, Reply | QServeError)
        try:
            return Said(self.caller.value(outcome))
        except TaskError as exc:
            return Said(None, exc.type_name)
        except QServeError as exc:
            return Said(None, type(exc).__name__)

    # What is left

    def runs(self, name: str) -> list[int]:
        """The attempts that were run of a call."""
        path = self.folder / "runs"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[1]) for line in lines if line.split()[0] == name]

    def records(self) -> list[str]:
        """States of the durable calls there are."""
        states: Any = [self.redis.hget(key, "state") for key in self.redis.scan_iter(f"{self.keys.base}call:*")]
        return [state.decode() for state in states if state is not None]

    def letters(self) -> int:
        """How many dead letters there are."""
        return int(self.redis.xlen(self.keys.dead_letters(NAME)))

    def logs(self) -> str:
        """What its processes have said, and what they left in Redis."""
        beats, pending = (
            self.redis.hgetall(self.keys.heartbeats(NAME)),
            self.redis.xpending(self.keys.calls(NAME), GROUP),
        )
        said = [f"{each.process.args!r}\n{each.log.read_text()}" for each in self._processes]
        return "\n".join((f"heartbeats {beats!r}, pending {pending!r}", *said))

    async def quiet(self) -> None:
        """Until nothing is queued or runs."""
        await until(lambda: self.redis.xlen(self.keys.calls(NAME)) == 0, LIMIT_S)

    async def forgotten(self, *replicas: str) -> None:
        """Until nobody remembers these replicas."""
        names = [name for name in replicas if name]
        beats = self.keys.heartbeats(NAME)
        await until(lambda: not any(self.redis.hexists(beats, name) for name in names), LIMIT_S)

    def immortal(self) -> list[str]:
        """Keys that nobody will ever delete, and that do not expire: garbage."""
        found = []
        for key in self.redis.scan_iter(self.keys.base + "*"):
            kind = key.decode().removeprefix(self.keys.base).partition(":")[0]
            if not _FOREVER.fullmatch(kind) and self.redis.pttl(key) == -1:
                found.append(key.decode())
        return found
