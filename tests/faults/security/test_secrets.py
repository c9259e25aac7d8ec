"""Keys: changed without loss, and never where they do not belong."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from tests.faults.security.guarded import NAMESPACE, Guarded, guarded
from tests.support.processes import command_line
from tests.support.serving import ROOT, free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

MARK = "canary"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for the path of a socket."""
    path = Path(tempfile.mkdtemp(prefix="qs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def deploy(instance: Guarded, **more: str) -> None:
    """Deploy Echo."""
    deployed = instance.run("deployer", "qserve.cli", "deploy", "tests.faults.security.guarded_app", **more)
    assert deployed.returncode == 0, deployed.stderr + instance.log("node")


class Shift:
    """A gateway, a node and a program that calls, with the same keys."""

    def __init__(self, instance: Guarded, keys: str, number: int) -> None:
        self.instance, self.ready = instance, instance.folder / f"ready-{number}"
        before = len(nodes(instance))
        self.node = instance.start(
            "worker", f"node-{number}", "qserve_workers.node", "--replicas-per-node", "1", QSERVE_SECRET=keys
        )
        self.gateway = instance.start(
            *("gateway", f"gateway-{number}", "qserve_gateway", "--port", "0", "--ready-file", str(self.ready)),
            QSERVE_SECRET=keys,
        )
        wait_until(lambda: self.ready.exists() and self.ready.read_text().endswith("}\n"))
        wait_until(lambda: len(nodes(instance)) > before)
        if number:
            wait_until(lambda: serving(instance) > before)
        self.url = json.loads(self.ready.read_text())["url"]
        self.keys = keys

    def call(self) -> None:
        """Calls from now on."""
        self.load = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.security.rotation_load"],
            cwd=ROOT,
            env=self.instance.environment("client", QSERVE_SECRET=self.keys),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.load.stdout is not None
        assert self.load.stdout.readline() == b"calling\n"

    def end(self) -> dict[str, Any]:
        """Node, program and gateway leave, in this order, while others serve; what the calls came to."""
        self.node.terminate()
        self.node.wait(patience(40))
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """The program and the gateway leave; what the calls came to."""
        output, _ = self.load.communicate(timeout=patience(40))
        self.gateway.terminate()
        self.gateway.wait(patience(40))
        return cast("dict[str, Any]", json.loads(output))


def nodes(instance: Guarded) -> "dict[bytes, bytes]":
    with instance.connect("admin") as admin:
        return cast("dict[bytes, bytes]", admin.hgetall(f"qs:{{{NAMESPACE}}}:nodes"))


def serving(instance: Guarded) -> int:
    """How many replicas take calls."""
    with instance.connect("admin") as admin:
        infos = cast("list[bytes]", admin.hvals(f"qs:{{{NAMESPACE}}}:replicas:Echo"))
    return sum(b"SERVING" in info for info in infos)


@pytest.mark.timeout(150)
def test_keys_change_under_load_and_no_call_is_lost(folder: Path) -> None:
    with guarded(folder, processes=False) as instance:
        old, new = instance.secret, "new-" + instance.secret
        shift = Shift(instance, old, 0)
        deploy(instance)
        shift.call()
        for number, keys in enumerate((f"{old},{new}", f"{new},{old}", new), start=1):
            if keys == new:
                deploy(instance, QSERVE_SECRET=f"{new},{old}")
            following = Shift(instance, keys, number)
            following.call()
            for url in (shift.url, following.url):
                for _ in range(20):
                    assert urllib.request.urlopen(f"{url}/Echo", b"abc", timeout=patience(30)).read() == b"3"
            outcome = shift.end()
            assert outcome["failed"] == []
            assert outcome["done"] > 3
            shift = following
        assert shift.finish()["failed"] == []
        with instance.connect("admin") as admin:
            assert admin.hget(f"qs:{{{NAMESPACE}}}:counters", "rejected_frames") is None


@pytest.mark.timeout(150)
def test_no_secret_is_where_it_does_not_belong(folder: Path) -> None:
    """Not in logs, command lines, pages, bodies, outputs, or in Redis."""
    admin_port = free_port()
    variables = {
        "QSERVE_LOG_LEVEL": "DEBUG",
        "QSERVE_ACCESS_LOG": "json",
        "QSERVE_API_KEYS": f"{MARK}-api-key",
        "QSERVE_ADMIN_PORT": str(admin_port),
        "QSERVE_ADMIN_TOKEN": f"{MARK}-admin-token",
    }
    with guarded(folder, mark=f"{MARK}-", variables=variables) as instance:
        deploy(instance)
        shown = [text(instance.run("client", "tests.faults.security.guarded_client", QSERVE_LOG_LEVEL="DEBUG"))]
        for path in ("/Echo", "/Echo/stream", "/nowhere", "/-/healthz", "/-/routes", "/-/calls/d0", "/-/metrics"):
            keys = (f"{MARK}-api-key", "wrong")
            shown += [body(instance.gateway_url + path, {"X-API-Key": key}) for key in keys]
        for path in ("/", "/metrics", "/status", "/healthz", "/deployments", "/dead/Echo"):
            tokens = (f"Bearer {MARK}-admin-token", "Bearer wrong")
            shown += [body(f"http://127.0.0.1:{admin_port}{path}", {"Authorization": token}) for token in tokens]
        commands = (["status"], ["status", "--json"], ["doctor"])
        shown += [text(instance.run("metrics", "qserve.cli", *each, QSERVE_LOG_LEVEL="DEBUG")) for each in commands]
        shown.append(text(instance.run("deployer", "qserve.cli", "dead", "ls", "Echo")))
        nobody = instance.url("metrics").replace(str(instance.port), str(free_port()))
        nonsense, gone = nobody.replace("redis://", "nonsense://"), instance.url("metrics").replace("metrics", "gone")
        for module, url in (
            *((["qserve.cli", "status"], each) for each in (nobody, nonsense, gone)),
            *((["qserve_gateway", "--port", "0"], each) for each in (nonsense, gone)),
        ):
            refused = instance.run("metrics", *module, QSERVE_REDIS_URL=url, QSERVE_LOG_LEVEL="DEBUG")
            assert refused.returncode != 0
            shown.append(text(refused))
        for process in [each for kept in instance.processes for each in family(kept.pid)]:
            shown.append(command_line(process))
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                shown.append(process.name())
        with instance.connect("admin") as admin:
            for key in cast("list[bytes]", admin.keys("*")):
                shown += [key.decode(errors="replace"), repr(admin.dump(key))]
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        wait_until(lambda: "again" in instance.log("gateway"))
    shown += [path.read_text(errors="replace") for path in folder.glob("*.log")]
    assert len(shown) > 60
    assert [each[max(0, each.index(MARK) - 200) :][:400] for each in shown if MARK in each] == []


def text(done: "subprocess.CompletedProcess[str]") -> str:
    return done.stdout + done.stderr


def body(url: str, headers: dict[str, str]) -> str:
    """Head and body of a response, whatever its status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=patience(30)) as response:
            return f"{response.headers}{response.read()!r}"
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.headers}{error.read()!r}"


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def test_only_its_owner_reads_the_instance_file(qserve_instance: object) -> None:
    (file,) = Path(os.environ["QSERVE_RUNTIME_DIR"]).rglob("default.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o077 == 0
