"""A ledger of durable calls while replicas and the server are killed: what was accepted ends, with its own result."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import qserve
from qserve import serve
from qserve.broker.instance.heartbeats import post_tombstone
from qserve.broker.instance.state import State
from qserve.broker.keys import GROUP
from qserve.calls.handle import get_handle
from qserve.calls.process_client import close_current_client
from qserve.settings import Settings
from qserve.wire.messages import Signer
from qserve.wire.spec import DeploymentSpec, Target
from tests.support.servers import SECRET, Server
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import joined, wait_until

CALLS = 500
KILLS = 12
APP = """
import asyncio, os, random

async def work(number):
    descriptor = os.open(os.environ["LEDGER"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, f"{number}\\n".encode())
    os.close(descriptor)
    await asyncio.sleep(random.uniform(0, 0.1))
    if number % 10 == 0 and random.random() < 0.3:
        raise ValueError("try again")
    return number * 7
"""


class Replicas:
    """Three replicas without a worker; whoever is killed is replaced, and its death made known as a worker would."""

    def __init__(self, state: State, environment: dict[str, str]) -> None:
        self._state = state
        self._environment = environment
        self.alive = [self._start() for _ in range(3)]

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tests.support.replica_host", "work"]
        return subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def kill(self, which: int) -> None:
        killed = self.alive[which]
        killed.kill()
        reports, _ = killed.communicate()
        if reports:
            replica = json.loads(reports.splitlines()[0])["replica"]
            post_tombstone(self._state.redis, self._state.keys, "work", replica, self._state.signer)
        self.alive[which] = self._start()

    def stop(self) -> None:
        for each in self.alive:
            each.kill()
            each.communicate()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    server = Server(folder)
    for name, value in {
        "QSERVE_REDIS_URL": server.url,
        "QSERVE_SECRET": SECRET,
        "QSERVE_BEAT_INTERVAL_S": "0.2",
        "QSERVE_DEAD_AFTER_S": "1.5",
        "QSERVE_MAX_DELIVERIES": "50",
        "LEDGER": str(folder / "ledger"),
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    close_current_client()
    server.kill()
    shutil.rmtree(folder)


@pytest.mark.timeout(150)
def test_every_call_ends_once_whatever_dies(server: Server) -> None:
    (server.folder / "ledgerapp.py").write_text(APP)
    settings = Settings()
    state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
    target = Target("ledgerapp:work", sys_path=(str(server.folder),))
    spec = DeploymentSpec(name="work", target=target, revision="1", is_class=False, max_concurrent_queries=8)
    state.deploy(spec, expected=0)
    replicas = Replicas(state, dict(os.environ))
    accepted: dict[int, str] = {}
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # noqa: T201  shown where it fails
    dice = random.Random(seed)
    submitted = threading.Event()

    def submit() -> None:
        handle = get_handle("work").options(durable=True, retries=100, backoff=0.001)
        for number in range(CALLS):
            with contextlib.suppress(qserve.BrokerUnavailable):  # perhaps accepted, perhaps not
                accepted[number] = handle.remote(number).id
            time.sleep(0.005)
        submitted.set()

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        for kill in range(KILLS):
            time.sleep(dice.uniform(0.1, 0.6))
            replicas.kill(dice.randrange(3))
            if kill == KILLS // 2:
                server.kill()
                server.start()
        joined(thread, limit_s=60)
        assert submitted.is_set()
        assert len(accepted) > CALLS * 0.8

        close_current_client()  # another one collects
        refs = {number: serve.get_ref(call_id) for number, call_id in accepted.items()}
        qserve.wait(list(refs.values()), num_returns=len(refs), timeout=patience(30))
        stuck = [ref for ref in refs.values() if not ref.done()]
        assert not stuck, "\n".join(str((ref.status(), _trace(state, ref.id))) for ref in stuck)
        assert {number: ref.result(0) for number, ref in refs.items() if ref.result(0) != number * 7} == {}
        assert {ref.status().state for ref in refs.values()} == {"done"}
        starts = [int(line) for line in (server.folder / "ledger").read_text().split()]
        assert accepted.keys() <= set(starts)
        _nothing_is_left(state, len(starts))
    finally:
        replicas.stop()
        state.close()


def _trace(state: State, call_id: str) -> object:
    keys = state.keys
    record = cast("dict[bytes, bytes]", state.redis.hgetall(keys.call(call_id)))
    told = {name: value for name, value in record.items() if name not in (b"result", b"frame")}
    entry = record.get(b"entry", b"0-0").decode()
    pending = state.redis.xpending_range(keys.calls("work"), GROUP, entry, entry, 1)
    return told, pending, state.redis.hgetall(keys.heartbeats("work"))


def _nothing_is_left(state: State, starts: int) -> None:
    keys, client = state.keys, state.redis
    wait_until(lambda: (client.xlen(keys.calls("work")), client.zcard(keys.due("work"))) == (0, 0))
    assert client.xpending(keys.calls("work"), GROUP)["pending"] == 0
    assert client.xlen(keys.dead_letters("work")) == 0
    assert starts < CALLS * 3
