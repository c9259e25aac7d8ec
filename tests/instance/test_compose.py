"""docker-compose.yml on a real engine; skipped, and counted as skipped, where there is none."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.support.serving import ROOT, free_port
from tests.support.slowness import patience
from tests.support.waiting import joined, wait_until

PROJECT = "qserve-test"


def compose_command() -> list[str] | None:
    """Compose v2, or v1.29, or None without a running engine."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and subprocess.run([*command, "version"], check=False, capture_output=True).returncode == 0
        ):
            engine = subprocess.run(["docker", "info"], check=False, capture_output=True).returncode == 0
            return command if engine else None
    return None


COMMAND = compose_command()
pytestmark = [
    pytest.mark.skipif(COMMAND is None, reason="no Docker engine with Compose here"),
    pytest.mark.timeout(900),
]


class Stack:
    """One run of the project's compose file under a project name and port of its own."""

    def __init__(self, folder: Path, overlays: list[str], **environment: str) -> None:
        self.port = free_port()
        self.folder = folder
        self.overlays = overlays
        settings = {"QSERVE_PORT": str(self.port), **environment}
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def compose(self, *arguments: str, check: bool = True) -> str:
        assert COMMAND is not None
        files = [part for name in ("docker-compose.yml", *self.overlays) for part in ("-f", str(ROOT / name))]
        if network := os.environ.get("QSERVE_TEST_BUILD_NETWORK"):
            override = {name: {"build": {"network": network}} for name in ("deploy", "gateway", "worker")}
            path = self.folder / "override.yml"
            path.write_text(json.dumps({"services": override}))  # JSON is YAML
            files += ["-f", str(path)]
        head = [*COMMAND, "--project-name", PROJECT, "--project-directory", str(ROOT)]
        head += ["--env-file", str(self.folder / ".env")]
        # The settings under test come from the .env file alone.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}
        done = subprocess.run([*head, *files, *arguments], check=False, capture_output=True, text=True, env=environment)
        if check and done.returncode:
            pytest.fail(f"compose {' '.join(arguments)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def get(self, path: str, timeout_s: float = 10, headers: dict[str, str] | None = None) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers or {})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return str(response.read().decode())

    def wait_for(self, path: str, timeout_s: float = 120, headers: dict[str, str] | None = None) -> str:
        """The first answer with status 200."""

        def answer() -> str | None:
            with contextlib.suppress(OSError):
                return self.get(path, headers=headers)
            return None

        return wait_until(
            answer, timeout_s, shows=lambda: self.compose("logs", "--no-color", "--tail", "40", check=False)
        )

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def inspect(self, container: str, form: str) -> str:
        done = subprocess.run(["docker", "inspect", "-f", form, container], capture_output=True, text=True, check=True)
        return done.stdout.strip()


@pytest.fixture(scope="class")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack of a test class, with the settings and `up` options that the class names."""
    overlays = getattr(request.cls, "overlays", [])
    running = Stack(tmp_path_factory.mktemp("compose"), overlays, **request.cls.settings)
    running.compose("down", "--volumes", "--remove-orphans")  # what a test that was killed left behind
    try:
        running.compose("up", "--build", "--detach", *request.cls.up)
        for path in request.cls.ready:
            running.wait_for(path)
        yield running
    finally:
        running.compose("down", "--volumes", "--remove-orphans", check=False)
        find = ["docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}"]
        left = subprocess.run(find, check=True, capture_output=True, text=True).stdout
        assert left == "", "the test left containers behind"


class TestWithoutSecret:
    """The file as it is: all examples on one node."""

    settings: ClassVar[dict[str, str]] = {}
    up: ClassVar[list[str]] = []
    ready: ClassVar[list[str]] = ["/hello", "/noop", "/counter", "/digits/docs"]

    def test_up_without_a_secret_serves_every_example(self, stack: Stack) -> None:
        assert stack.get("/hello?name=Ada") == "Hello Ada!"
        assert stack.get("/noop") == "ok"
        routes = json.loads(stack.get("/-/routes"))
        assert routes == {
            "/hello": "Hello",
            "/counter": "Counter",
            "/noop": "Noop",
            "/notes": "Notes",
            "/digits": "Digits",
        }

    def test_the_digits_are_read_as_well_as_the_model_can(self, stack: Stack) -> None:
        command = [sys.executable, "examples/digits/evaluate.py", "--url", f"http://127.0.0.1:{stack.port}/digits"]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.stdout.startswith("accuracy 0.99"), done.stdout + done.stderr

    def test_only_the_gateways_port_is_published(self, stack: Stack) -> None:
        published = {
            service: stack.inspect(container, "{{json .HostConfig.PortBindings}}")
            for service in ("valkey", "gateway", "worker")
            for container in stack.containers(service)
        }
        assert str(stack.port) in published.pop("gateway")
        assert set(published.values()) <= {"{}", "null"}

    def test_our_containers_run_as_an_ordinary_user(self, stack: Stack) -> None:
        for service in ("gateway", "worker"):
            assert stack.compose("exec", "-T", service, "id", "-un").strip() == "qserve"

    def test_valkey_keeps_what_it_accepted(self, stack: Stack) -> None:
        for setting, value in {"appendonly": "yes", "maxmemory-policy": "noeviction"}.items():
            answer = stack.compose("exec", "-T", "valkey", "valkey-cli", "config", "get", setting)
            assert answer.split() == [setting, value]

    def test_valkey_gateway_and_worker_report_their_health(self, stack: Stack) -> None:
        for service in ("valkey", "gateway", "worker"):
            (container,) = stack.containers(service)
            wait_until(partial(is_healthy, stack, container), 90)


def is_healthy(stack: Stack, container: str) -> bool:
    return stack.inspect(container, "{{.State.Health.Status}}") == "healthy"


class TestWithSecret:
    """Four nodes with the counter, and a secret in `.env`."""

    settings: ClassVar[dict[str, str]] = {"QSERVE_APP": "examples.hello", "QSERVE_SECRET": secrets.token_hex(16)}
    up: ClassVar[list[str]] = ["--scale", "worker=4"]
    ready: ClassVar[list[str]] = ["/counter"]

    def test_four_workers_share_the_calls_of_a_signed_stack(self, stack: Stack) -> None:
        """Every reply names the container it came from."""
        workers = {stack.inspect(container, "{{.Config.Hostname}}") for container in stack.containers("worker")}
        assert len(workers) == 4
        seen: set[str] = set()

        def all_have_answered() -> bool:
            seen.add(json.loads(stack.get("/counter"))["host"])
            return seen == workers

        wait_until(all_have_answered, 60, shows=lambda: seen)

    def test_no_call_fails_while_workers_come_and_go(self, stack: Stack) -> None:
        """From four workers to one and back, with calls under way all the time."""
        failures: list[BaseException] = []
        counts: list[int] = []
        over = threading.Event()

        def keep_calling() -> None:
            while not over.is_set():
                try:
                    counts.append(json.loads(stack.get("/counter", timeout_s=60))["count"])
                except (OSError, ValueError, KeyError) as error:
                    failures.append(error)

        callers = [threading.Thread(target=keep_calling) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            for scale in (1, 4):
                stack.compose("up", "--detach", "--no-build", "--scale", f"worker={scale}")
        finally:
            over.set()
            joined(*callers)
        assert failures == []
        assert len(counts) > 100
        assert len(stack.containers("worker")) == 4

    def test_a_message_without_the_key_never_runs(self, stack: Stack) -> None:
        """A driver in the same network that lacks the secret is refused."""
        call = ["exec", "-T", "-e", "QSERVE_SECRET=", "worker", "qserve", "call", "Counter", "add", "1"]
        assert stack.compose(*call, check=False) == ""


class TestSecured:
    """With docker-compose.secure.yml: API keys, an access log, and an admin listener."""

    overlays: ClassVar[list[str]] = ["docker-compose.secure.yml"]
    settings: ClassVar[dict[str, str]] = {
        "QSERVE_APP": "examples.hello",
        "QSERVE_SECRET": secrets.token_hex(16),
        "QSERVE_API_KEYS": "key-of-the-app",
        "QSERVE_ADMIN_TOKEN": "token-of-the-operator",
        "QSERVE_ADMIN_PUBLISHED_PORT": str(free_port()),
    }
    up: ClassVar[list[str]] = []
    ready: ClassVar[list[str]] = ["/-/healthz"]

    def test_only_who_brings_a_key_is_served(self, stack: Stack) -> None:
        stack.wait_for("/hello?name=Ada", headers={"X-API-Key": "key-of-the-app"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            stack.get("/hello?name=Ada")

    def test_metrics_are_for_who_has_the_token(self, stack: Stack) -> None:
        url = f"http://127.0.0.1:{self.settings['QSERVE_ADMIN_PUBLISHED_PORT']}/-/metrics"
        request = urllib.request.Request(url, headers={"Authorization": "Bearer token-of-the-operator"})
        with urllib.request.urlopen(request, timeout=patience(10)) as response:
            assert "qserve_queue_depth" in response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url, timeout=patience(10))


class TestOwnApplication:
    """examples/own_app, copied elsewhere, with the qserve of this checkout, a secret, and Redis on the loopback."""

    def test_it_serves_clients_outside_and_stops_soon(self, tmp_path: Path) -> None:
        folder = tmp_path / "own"
        shutil.copytree(ROOT / "examples/own_app", folder)
        wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        subprocess.run([sys.executable, *wheel], check=True)
        port, redis_port = free_port(), free_port()
        secret = secrets.token_hex(16)
        settings = {"QSERVE_PORT": port, "QSERVE_REDIS_PORT": redis_port, "QSERVE_SECRET": secret}
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        build: dict[str, Any] = {"args": {"QSERVE": f"./{next(folder.glob('*.whl')).name}[all]"}}
        if network := os.environ.get("QSERVE_TEST_BUILD_NETWORK"):
            build["network"] = network
        services = {"services": {name: {"build": build} for name in ("deploy", "gateway", "worker")}}
        (folder / "test.yml").write_text(json.dumps(services))
        assert COMMAND is not None
        files = [
            part for name in ("docker-compose.yml", "docker-compose.redis.yml", "test.yml") for part in ("-f", name)
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}

        def compose(*arguments: str) -> str:
            command = [*COMMAND, "--project-name", f"{PROJECT}-own", *files, *arguments]
            done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
            assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            return done.stdout

        try:
            compose("up", "--build", "--detach")
            url = f"http://127.0.0.1:{port}/median?numbers=1,5,2"
            wait_until(lambda: answer_of(url) == "2.0", 120)
            reach = {"QSERVE_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0", "QSERVE_SECRET": secret}
            client = [sys.executable, "client.py"]
            outside = {**environment, **reach}
            said = subprocess.run(client, cwd=folder, env=outside, check=True, capture_output=True, text=True).stdout
            assert said == "2.0\n"
            assert f"http://localhost:{port}" in compose("exec", "-T", "worker", "qserve", "status")
            started = time.monotonic()
            compose("stop")
            assert time.monotonic() - started < patience(10)
        finally:
            compose("down", "--volumes")


def answer_of(url: str) -> str | None:
    """What is there; None while nothing is."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=patience(10)) as response:
        return str(response.read().decode())
    return None
