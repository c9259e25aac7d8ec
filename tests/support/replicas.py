"""Processes with replicas, the deployment they serve, and what their code has noted."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis

from qserve.broker.instance.heartbeats import post_tombstone
from qserve.broker.instance.state import State
from qserve.broker.keys import GROUP
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.messages import Signer
from qserve.wire.spec import SERVING, STANDBY, DeploymentSpec, Target
from tests.support.processes import end_at_once
from tests.support.replica_code import Books
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import until

NAME = "Code"


class Host:
    """A process with a replica."""

    def __init__(self, settings: Settings, folder: Path, *arguments: str) -> None:
        self.reports_file = folder / f"reports-{secrets.token_hex(4)}"
        self.log = self.reports_file.with_suffix(".log")
        given = settings.model_dump(exclude_defaults=True)
        environment = os.environ | {f"QSERVE_{name.upper()}": str(value) for name, value in given.items()}
        with self.reports_file.open("wb") as out, self.log.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.replica_host", NAME, *arguments],
                env=environment,
                cwd=ROOT,
                stdout=out,
                stderr=err,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def reports(self, event: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.reports_file.read_text().splitlines()]
        return [report for report in found if report["event"] == event]

    @property
    def id(self) -> str:
        return str(self.reports("state")[0]["replica"])

    @property
    def state(self) -> str:
        states = self.reports("state")
        return str(states[-1]["state"]) if states else ""

    async def reached(self, state: str) -> "Host":
        await until(lambda: self.state == state or self.process.poll() is not None)
        assert self.state == state, self.log.read_text()
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, patience(30))


class World:
    """A deployment, its replicas and what they note."""

    def __init__(self, settings: Settings, redis_client: "redis.Redis", folder: Path) -> None:
        self.settings = settings.model_copy(update={"beat_interval_s": 0.2, "dead_after_s": patience(1.0)})
        self.redis = redis_client
        self.keys = settings.keys.of(NAME)
        self.signer = Signer(settings.secrets)
        self.books = Books(folder)
        self.folder = folder
        self.hosts: list[Host] = []
        self.codec = Codec(allow_pickle=True, max_bytes=2**24)

    def deploy(self, code: str = "Code", **changes: Any) -> None:
        spec = DeploymentSpec(
            name=NAME,
            target=Target(f"tests.support.replica_code:{code}", sys_path=(str(ROOT),)),
            revision="1",
            init_args=self.codec.pack_call((str(self.folder),), {}),
            **changes,
        )
        state = State(self.settings.redis_url, self.settings.keys, self.signer)
        state.deploy(spec, expected=state.generation(NAME))
        state.close()

    async def start(self, count: int = 1, *arguments: str) -> list[Host]:
        """More replicas, serving (or standing by)."""
        hosts = [Host(self.settings, self.folder, *arguments) for _ in range(count)]
        self.hosts += hosts
        for host in hosts:
            await host.reached(STANDBY if "standby" in arguments else SERVING)
        return hosts

    def bury(self, host: Host) -> None:
        """What a worker does when it has seen its child die."""
        host.process.wait(patience(10))
        post_tombstone(self.redis, self.keys, NAME, host.id, self.signer)

    async def gave_to_ghost(self, calls: int, starts: int = 1) -> None:
        """Wait for so many calls and give them to a replica that does not run, as if it had started each.

        To be called before others start.
        """
        stream = self.keys.calls(NAME)
        await until(lambda: self.redis.xlen(stream) == calls)
        read: Any = self.redis.xreadgroup(GROUP, "ghost", {stream: ">"})
        entries = [entry for entry, _ in read[0][1]]
        self.redis.xclaim(stream, GROUP, "ghost", 0, entries, retrycount=2 * starts - 1)
        self.redis.hset(self.keys.heartbeats(NAME), "ghost", "1")
        # It dies when the test says so: replicas that are slow would think it dead before, or themselves.
        self.settings = self.settings.model_copy(update={"dead_after_s": patience(60.0)})

    def ghost_dies(self) -> None:
        """Let the others know of it at once."""
        post_tombstone(self.redis, self.keys, NAME, "ghost", self.signer)

    def end(self) -> None:
        """Stop all replicas."""
        end_at_once(*(host.process for host in self.hosts))

    async def started(self, name: str, times: int = 1) -> None:
        """Wait until a call was started so often."""
        await until(lambda: len(self.books.starts(name)) == times)

    def host_of(self, name: str) -> Host:
        """The replica that started a call first."""
        pid = self.books.starts(name)[0]
        return next(host for host in self.hosts if host.pid == pid)

    def counter(self, name: str) -> int:
        return int(self.redis.hget(self.keys.counters, name) or 0)

    def letters(self) -> list[dict[bytes, bytes]]:
        found: Any = self.redis.xrange(self.keys.dead_letters(NAME))
        return [fields for _, fields in found]

    def pending_for(self, replica: str) -> int:
        found: Any = self.redis.xpending_range(self.keys.calls(NAME), GROUP, "-", "+", 100, replica)
        return len(found)
