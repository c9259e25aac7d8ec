"""What makes a Redis server unfit for calls, from facts and from real servers."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from qserve import serve
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.server import embedded, redis_checks
from qserve.broker.server.address import Broker, parse
from qserve.broker.server.redis_checks import (
    FAIL,
    OK,
    WARN,
    Finding,
    as_error,
    check_server,
    connect,
    judge,
    require_usable,
    why_unreachable,
)
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.wire.messages import Signer
from tests.support.servers import wait_until_accepting
from tests.support.serving import free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

GOOD_INFO: dict[str, Any] = {
    "redis_version": "8.2.3",
    "role": "master",
    "cluster_enabled": 0,
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
    "used_memory": 1_000_000,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
}
GOOD_CONFIG = {"appendfsync": "everysec", "tcp-keepalive": "300", "timeout": "0", "maxmemory-clients": "0"}

StartServer = Callable[..., str]


def found(level: str, info: dict[str, Any] | None = None, config: dict[str, str] | None = None) -> list[Finding]:
    """Findings of a level for a good server with a few facts changed."""
    findings = judge(GOOD_INFO | (info or {}), GOOD_CONFIG | (config or {}))
    return [finding for finding in findings if finding.level == level]


def the_only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts real servers on a port or, without one, a unix socket; gives their URL."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, tcp: bool = False) -> str:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        port = free_port() if tcp else 0
        place = folder / "s"
        listen = ["--port", str(port), "--bind", "127.0.0.1"] if tcp else ["--port", "0", "--unixsocket", str(place)]
        command = [str(embedded.find_server()), *listen, "--save", "", "--dir", str(folder), *options]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        address: Any = ("127.0.0.1", port) if tcp else str(place)
        wait_until(lambda: accepts(address))
        return f"redis://127.0.0.1:{port}" if tcp else f"unix://{place}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def accepts(address: Any) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        return probe.connect_ex(address) == 0


def as_user(url: str, name: str, *rules: str) -> str:
    """Make a user who may do everything but what the rules take away; the URL with its name and password."""
    with connect(url) as admin:
        admin.execute_command("ACL", "SETUSER", name, "on", ">pw", "~*", "+@all", *rules)
    return url.replace("redis://", f"redis://{name}:pw@")


def refusal(url: str) -> str:
    """Why a server is not used; the text that a command shows."""
    with connect(url, timeout_s=0.5) as redis, pytest.raises((BrokerUnavailable, ConfigurationError)) as caught:
        require_usable(redis)
    return str(caught.value)


# From facts


def test_a_good_server_gives_nothing_to_do() -> None:
    assert [finding for finding in judge(GOOD_INFO, GOOD_CONFIG) if finding.level != OK] == []


@pytest.mark.parametrize("version", ["6.2.21", "5.0.3", "6.0"])
def test_redis_before_7_is_refused(version: str) -> None:
    failure = the_only(found(FAIL, {"redis_version": version}))
    assert failure.check == "version"
    assert f"Redis {version}" in failure.text


@pytest.mark.parametrize("version", ["7.0.15", "7.2.13", "8.0.5", "8.6.3", "9.0.0-rc1", "8.2.3-alpine"])
def test_redis_since_7_is_usable(version: str) -> None:
    assert found(FAIL, {"redis_version": version}) == []


def test_valkey_is_judged_by_its_own_version() -> None:
    """It reports redis_version 7.2.4 for compatibility, whose holes it does not have."""
    valkey = {"redis_version": "7.2.4", "valkey_version": "9.1.0", "server_name": "valkey"}
    assert found(FAIL, valkey) == []
    assert found(WARN, valkey) == []


@pytest.mark.parametrize(
    "info",
    [
        {"redis_version": "7.0.15"},
        {"redis_version": "7.2.10"},
        {"redis_version": "7.4.5"},
        {"redis_version": "8.0.3"},
        {"redis_version": "8.2.1"},
        {"redis_version": "7.2.4", "valkey_version": "7.2.10"},
        {"redis_version": "7.2.4", "valkey_version": "8.1.3"},
        {"redis_version": "7.2.4", "valkey_version": "9.0.2"},
    ],
)
def test_versions_with_published_holes_are_warned_about(info: dict[str, Any]) -> None:
    warning = the_only(found(WARN, info))
    assert warning.check == "security"
    assert warning.advice


@pytest.mark.parametrize("version", ["7.2.11", "7.4.6", "8.0.4", "8.2.2", "8.4.0", "8.6.2"])
def test_patched_versions_are_not_warned_about(version: str) -> None:
    assert found(WARN, {"redis_version": version}) == []


@pytest.mark.parametrize(("version", "warned"), [("8.6.2", True), ("8.6.3", False)])
def test_client_eviction_is_warned_about_where_it_is_dangerous(version: str, warned: bool) -> None:
    warnings = found(WARN, {"redis_version": version}, {"maxmemory-clients": "100mb"})
    assert [warning.check for warning in warnings] == (["security"] if warned else [])


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "volatile-ttl", "allkeys-random"])
def test_every_evicting_policy_is_refused(policy: str) -> None:
    """Also the volatile ones: large payloads and liveness keys carry an expiry."""
    failure = the_only(found(FAIL, {"maxmemory_policy": policy}))
    assert policy in failure.text
    assert "noeviction" in failure.advice


def test_a_read_only_replica_is_refused() -> None:
    assert the_only(found(FAIL, {"role": "slave"})).check == "role"


@pytest.mark.parametrize(
    ("info", "config", "check"),
    [
        ({"aof_enabled": 0}, {}, "persistence"),
        ({"aof_last_write_status": "err"}, {}, "persistence"),
        ({"rdb_last_bgsave_status": "err"}, {}, "persistence"),
        ({"maxmemory": 1_000_000, "used_memory": 950_000}, {}, "memory"),
        ({"cluster_enabled": 1}, {}, "mode"),
        ({}, {"timeout": "300"}, "connections"),
        ({}, {"tcp-keepalive": "0"}, "connections"),
    ],
)
def test_what_works_but_should_be_looked_at_is_a_warning(
    info: dict[str, Any], config: dict[str, str], check: str
) -> None:
    warning = the_only(found(WARN, info, config))
    assert warning.check == check
    assert found(FAIL, info, config) == []


def test_a_host_that_forbids_config_is_judged_by_info() -> None:
    findings = judge(GOOD_INFO | {"maxmemory_policy": "allkeys-lru"}, {})
    assert [finding.check for finding in findings if finding.level == FAIL] == ["eviction"]
    assert any("CONFIG GET is not allowed" in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("offset", "level", "word"), [(0.4, OK, "agree"), (7.0, WARN, "ahead"), (-7.0, WARN, "behind")]
)
def test_clocks_that_differ_are_a_warning(offset: float, level: str, word: str) -> None:
    finding = the_only(list(redis_checks.check_clock(offset)))
    assert finding.level == level
    assert word in finding.text


def test_a_server_on_the_network_without_password_is_a_warning() -> None:
    assert the_only(list(redis_checks.check_exposure(parse("redis://cache.example.org")))).level == WARN
    assert list(redis_checks.check_exposure(parse("redis://:secret@cache.example.org"))) == []


def test_an_error_names_the_server_and_says_what_to_do() -> None:
    error = as_error(the_only(found(FAIL, {"maxmemory_policy": "allkeys-lru"})), "db:6379")
    assert isinstance(error, ConfigurationError)
    assert str(error).startswith("Redis at db:6379 cannot be used: maxmemory-policy is allkeys-lru")
    assert "CONFIG SET maxmemory-policy noeviction" in str(error)


# Against real servers


def test_a_fresh_server_is_usable_and_its_missing_append_only_file_is_told(start_server: StartServer) -> None:
    with connect(start_server()) as redis:
        require_usable(redis)
        levels = {finding.check: finding.level for finding in check_server(redis)}
    assert levels == {"reachable": OK, "version": OK, "eviction": OK, "persistence": WARN, "clock": OK}


def test_a_server_with_append_only_file_is_all_right(start_server: StartServer) -> None:
    with connect(start_server("--appendonly", "yes")) as redis:
        assert {finding.level for finding in check_server(redis)} == {OK}


def test_settings_are_read_from_the_server(start_server: StartServer) -> None:
    with connect(start_server("--appendonly", "yes", "--timeout", "9", "--tcp-keepalive", "0")) as redis:
        warnings = [finding.text for finding in check_server(redis) if finding.level == WARN]
    assert len(warnings) == 2
    assert "idle for 9 s" in warnings[0]
    assert "tcp-keepalive" in warnings[1]


def test_an_evicting_server_is_refused(start_server: StartServer) -> None:
    text = refusal(start_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"))
    assert "allkeys-lru" in text


def test_a_missing_password_is_told_apart_from_a_wrong_one(start_server: StartServer) -> None:
    url = start_server("--requirepass", "right", tcp=True)
    assert "wants a password and the URL has none" in refusal(url)
    wrong = refusal(url.replace("redis://", "redis://:wr0ng@"))
    assert "does not accept the user name and password" in wrong
    assert "wr0ng" not in wrong
    with connect(url.replace("redis://", "redis://:right@")) as redis:
        require_usable(redis)


def test_a_user_who_may_not_look_is_told_so(start_server: StartServer) -> None:
    with connect(as_user(start_server(tcp=True), "blind", "-info", "-time", "-role")) as redis:
        require_usable(redis)
        warned = the_only([finding for finding in check_server(redis) if finding.check == "permission"])
    assert warned.level == WARN
    assert "+info" in warned.advice


@pytest.mark.parametrize("cluster", [False, True])
def test_a_database_that_does_not_exist_is_named(start_server: StartServer, cluster: bool) -> None:
    url = f"{start_server('--cluster-enabled', 'yes' if cluster else 'no', tcp=True)}/99"
    with connect(url) as redis:
        found = the_only(check_server(redis))
    assert (found.check, found.level) == ("database", FAIL)
    assert "has no database 99, which the URL names" in refusal(url)
    with (
        closing(State(url, Keys("qs"), Signer(()))) as state,
        pytest.raises(ConfigurationError, match="no database 99"),
    ):
        state.names()


def test_what_a_server_in_cluster_mode_says_of_a_database_is_understood() -> None:
    said = ResponseError("SELECT is not allowed in cluster mode")
    found = why_unreachable(said, Broker(db=3))
    assert (found.check, found.level, "has no database 3" in found.text) == ("database", FAIL, True)


def test_a_server_without_info_is_not_taken_for_one_that_forbids_it(start_server: StartServer) -> None:
    with connect(start_server("--rename-command", "INFO", "")) as redis:
        warned = the_only([finding for finding in check_server(redis) if finding.check == "permission"])
    assert "the server does not answer INFO (unknown command" in warned.text
    assert "+info" not in warned.advice


def test_a_user_who_may_not_read_settings_can_work(start_server: StartServer) -> None:
    with connect(as_user(start_server(tcp=True), "worker", "-config")) as redis:
        require_usable(redis)
        assert any("CONFIG GET is not allowed" in finding.text for finding in check_server(redis))


def test_a_replica_of_another_server_is_refused(start_server: StartServer) -> None:
    primary = start_server(tcp=True)
    url = start_server("--replicaof", f"127.0.0.1 {primary.rpartition(':')[2]}")
    assert "read-only replica" in refusal(url)


@pytest.mark.parametrize("command", [("qserve_gateway", "--port", "0"), ("qserve_workers.node",)])
def test_no_process_starts_on_a_server_that_would_lose_calls(start_server: StartServer, command: list[str]) -> None:
    url = start_server("--maxmemory-policy", "allkeys-lru")
    environment = os.environ | {"QSERVE_REDIS_URL": url}
    started = [sys.executable, "-m", *command]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=patience(40), check=False)
    assert done.returncode == 1
    assert "maxmemory-policy is allkeys-lru" in done.stderr
    assert "CONFIG SET maxmemory-policy noeviction" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_start_refuses_a_replica(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    primary = start_server(tcp=True)
    url = start_server("--replicaof", f"127.0.0.1 {primary.rpartition(':')[2]}")
    monkeypatch.setenv("QSERVE_REDIS_URL", url)
    with pytest.raises(ConfigurationError, match="read-only replica"):
        serve.start(http_options={"port": 0})


def test_nobody_listening_may_pass_and_is_an_unavailable_broker() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    with connect(url) as redis, pytest.raises(BrokerUnavailable, match=r"cannot be reached at 127\.0\.0\.1"):
        require_usable(redis)


def test_a_host_that_does_not_exist_is_named() -> None:
    assert "nowhere.invalid:6379" in refusal("redis://nowhere.invalid")


def test_a_web_server_is_not_taken_for_redis() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), QuietHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = refusal(f"redis://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "is not Redis" in text


def test_a_server_that_never_answers_is_given_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        text = refusal(f"redis://127.0.0.1:{silent.getsockname()[1]}")
    assert "cannot be reached" in text
    assert time.monotonic() - started < patience(5)


def test_what_is_not_a_redis_url_is_said_without_showing_its_password() -> None:
    with pytest.raises(ConfigurationError) as caught:
        connect("http://:geheim@localhost")
    assert "redis://" in str(caught.value)
    assert "geheim" not in str(caught.value)


class QuietHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def test_a_server_that_is_no_cluster_is_told_from_one_that_is_away() -> None:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    port = free_port()
    server = subprocess.Popen([*embedded.command(folder), "--port", str(port), "--bind", "127.0.0.1"])
    try:
        wait_until_accepting(embedded.socket_path(folder), server)
        with (
            connect(f"redis+cluster://127.0.0.1:{port}") as client,
            pytest.raises(ConfigurationError, match="redis://"),
        ):
            require_usable(client)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)
    with connect(f"redis+cluster://127.0.0.1:{port}") as client, pytest.raises(BrokerUnavailable, match="refused"):
        require_usable(client)
