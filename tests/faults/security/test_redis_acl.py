"""Redis users with the least rights: everything works with them, and nothing else is allowed to them."""

import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import pytest
import redis
from click.testing import CliRunner

from qserve.broker.keys import Keys
from qserve.broker.server.acl import ROLES
from qserve.cli.command_line import main
from qserve.settings import Settings
from tests.faults.security.guarded import NAMESPACE, Guarded
from tests.instance.console.served import OPERATOR, PAGES, act, console_of, visitor
from tests.support.slowness import patience

FORBIDDEN = (
    *("KEYS *", "SCAN 0", "FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET maxmemory 1", "DEBUG SLEEP 0"),
    *("SCRIPT FLUSH", "SCRIPT KILL", "FUNCTION FLUSH", "FUNCTION LIST", "SHUTDOWN NOSAVE", "SAVE", "BGSAVE"),
    *("ACL LIST", "ACL SETUSER x", "ACL WHOAMI", "CLIENT LIST", "CLIENT KILL ID 1", "CLIENT PAUSE 1", "MONITOR"),
    *(
        "REPLICAOF no one",
        "SLAVEOF no one",
        "MODULE LIST",
        "MIGRATE h 1 k 0 1",
        "RESTORE k 0 x",
        "DUMP k",
        "SWAPDB 0 1",
    ),
    *("COPY a b", "RENAME a b", "OBJECT FREQ a", "LATENCY RESET", "SLOWLOG GET", "MEMORY DOCTOR", "SYNC", "PSYNC ? -1"),
    *("BGREWRITEAOF", "FAILOVER", "CLUSTER INFO", "RANDOMKEY", "SORT a", "EVAL_RO x 0", "DBSIZE", "WAIT 0 0"),
)


def test_everything_works_and_nothing_is_refused(instance: Guarded) -> None:
    called = instance.run("client", "tests.faults.security.guarded_client")
    assert called.returncode == 0, called.stderr
    with httpx.Client(base_url=instance.gateway_url, timeout=patience(30)) as http:
        assert http.get("/Echo").json() == 0
        assert http.post("/Echo", content=b"x" * 2_000_000).json() == 2_000_000
        assert len(http.get("/Echo/stream").content) == 100_000
        accepted = http.post("/Echo", content=b"abc", headers={"Prefer": "respond-async"})
        assert accepted.status_code == 202
        place = accepted.headers["location"]
        assert http.get(place, params={"wait": 20}).json()["response"]["body"] == "3"
        assert "event: done" in http.get(f"{place}/events").text
        keyed = [http.post("/Echo", content=b"abcd", headers={"Idempotency-Key": "k"}).json() for _ in range(2)]
        assert keyed == [4, 4]

    again = instance.run("deployer", "qserve.cli", "deploy", "tests.faults.security.guarded_app")
    assert again.returncode == 0, again.stderr
    status = instance.run("metrics", "qserve.cli", "status", "--json")
    assert status.returncode == 0, status.stderr
    assert "HEALTHY" in status.stdout
    top = instance.run("metrics", "qserve.cli", "top", "--json")
    assert top.returncode == 0, top.stderr
    doctor = instance.run("metrics", "qserve.cli", "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "CONFIG GET is not allowed" in doctor.stdout
    letters = instance.run("deployer", "qserve.cli", "dead", "ls", "Echo")
    assert letters.returncode == 0, letters.stderr
    assert "no good" in letters.stdout
    with instance.connect("admin") as admin:
        letter = admin.xrange("qs:{guarded}:dead:Echo")[0][0].decode()
    for command in ("show", "retry"):
        done = instance.run("deployer", "qserve.cli", "dead", command, "Echo", letter)
        assert done.returncode == 0, done.stderr
    deleted = instance.run("deployer", "qserve.cli", "delete", "Echo")
    assert deleted.returncode == 0, deleted.stderr
    for log in ("node", "gateway"):
        assert "NOPERM" not in instance.log(log)
    assert instance.denied() == []


@pytest.mark.parametrize("role", [role.name for role in ROLES])
def test_a_user_may_do_nothing_else(instance: Guarded, role: str) -> None:
    with instance.connect(role) as client:
        for command in FORBIDDEN:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        for key in ("other", "qs:{other}:q:Echo", "qs:{guarded}:unknown"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.get(key)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.publish("qs:{other}:x", "x")


@pytest.mark.parametrize("role", ["gateway", "client", "metrics"])
def test_who_only_calls_cannot_change_what_is_deployed(instance: Guarded, role: str) -> None:
    with instance.connect(role) as client:
        for write in (
            "HSET qs:{guarded}:meta:Echo spec x",
            "SET qs:{guarded}:http x",
            "HSET qs:{guarded}:replicas:Echo x x",
            "DEL qs:{guarded}:hb:Echo",
            "SETBIT qs:{guarded}:claims:x:0 0 1",
            "LPUSH qs:{guarded}:celery:qserve x",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*write.split())
        if role != "metrics":  # whose scripts may be given the key, but not write to it
            with pytest.raises(redis.exceptions.ResponseError, match="access"):
                client.eval("redis.call('HSET', KEYS[1], 'spec', 'x')", 1, "qs:{guarded}:meta:Echo")


def test_metrics_cannot_write_at_all(instance: Guarded) -> None:
    with instance.connect("metrics") as client:
        for command in ("XADD qs:{guarded}:q:Echo * a b", "INCR qs:{guarded}:counters", "EVAL x 0", "SET x y"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())


def test_the_lines_work_as_commands_too(instance: Guarded) -> None:
    printed = CliRunner().invoke(main, ["redis-acl", "--setuser", "--generate", "--prefix", "more-", "client"])
    assert printed.exit_code == 0, printed.output
    (line,) = printed.stdout.splitlines()
    with instance.connect("admin") as admin:
        assert admin.execute_command(*line.split())
        password = printed.stderr.split()[-1]
        assert password not in printed.stdout
        url = f"redis://more-client:{password}@127.0.0.1:{instance.port}/0"
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        admin.acl_deluser("more-client")


def test_a_password_that_nobody_gave_is_asked_for() -> None:
    printed = CliRunner().invoke(main, ["redis-acl", "metrics"])
    assert ">PASSWORD-OF-qserve-metrics" in printed.stdout
    assert "QSERVE_ACL_METRICS" in printed.stderr
    assert CliRunner().invoke(main, ["redis-acl", "--namespace", "a b"]).exit_code == 2


def test_the_console_shows_everything_and_says_what_its_user_may_not_do(instance: Guarded) -> None:
    deployed = instance.run("deployer", "qserve.cli", "deploy", "tests.faults.security.guarded_app")
    assert deployed.returncode == 0, deployed.stderr
    settings = Settings(redis_url=instance.url("gateway"), secret=instance.secret, namespace=NAMESPACE)
    with console_of(settings) as url, visitor(url, OPERATOR) as operator:
        for path in (*PAGES, "/deployments/Echo", "/deployments/Echo/series", "/calls?key=k", "/live?of=/-/console"):
            with operator.stream("GET", path) as answer:
                assert answer.status_code == 200, path
        for action in ("pause", "scale", "bound", "delete"):
            answer = act(operator, action, "Echo", replicas="3", bound="17")
            assert answer.status_code == 403, (action, answer.text)
            assert "Redis refuses this process" in answer.text
        assert "failed: " in operator.get("/audit").text
        assert "is submitted" in act(operator, "call", "Echo", method="fine").text


def test_no_key_and_no_script_is_forgotten() -> None:
    """Workers may use every key there is, and run every script: who adds one says here whose it is."""
    worker = next(role for role in ROLES if role.name == "worker")
    keys = Keys("n")
    allowed = [f"{keys.base}{pattern}" for pattern in worker.keys.split()]
    no_keys = {"namespace", "shards", "shard", "shard_count", "at", "of", "of_call", "all", "whole", "address"}
    for name in vars(Keys).keys() - no_keys:
        if name.startswith("_"):
            continue
        key = getattr(keys, name)
        if callable(key):
            key = key(*["x"] * len(inspect.signature(key).parameters))
        if key not in (keys.base, keys.celery_prefix):
            assert any(fnmatchcase(key, pattern) for pattern in allowed), f"{name} is in no user's keys"
    commands = set(worker.commands.split())
    for script in (Path(inspect.getfile(Keys)).parent / "lua").glob("*.lua"):
        for command, sub in re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", script.read_text()):
            assert commands & {command.lower(), f"{command}|{sub}".lower()}, f"{script.name}: {command} {sub}"
