"""A whole instance under the hands of somebody who can write everything to Redis, but has no key."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import cast

import psutil
import pytest
import redis

from qserve.broker.keys import Keys
from qserve.settings import Settings
from qserve.wire.names import is_name
from tests.faults.security import bad_frames as table
from tests.faults.security.guarded import NAMESPACE, Guarded
from tests.support.slowness import patience
from tests.support.waiting import wait_until

KEYS = Keys(NAMESPACE)


def post(instance: Guarded, path: str = "/Echo", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(instance.gateway_url + path, b"abc", headers or {})
    try:
        with urllib.request.urlopen(request, timeout=patience(30)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def family(instance: Guarded) -> set[int]:
    """Pids of all processes."""
    found = [psutil.Process(process.pid) for process in instance.processes]
    return {each.pid for process in found for each in (process, *process.children(recursive=True))}


def read_processes(client: "redis.Redis") -> tuple[str, ...]:
    """Ids of all that have an inbox."""
    ids = [*cast("list[bytes]", client.hkeys(KEYS.gateways)), *cast("list[bytes]", client.hkeys(KEYS.replicas("Echo")))]
    return tuple(each.decode() for each in ids)


def test_nothing_that_is_pushed_anywhere_comes_to_anything(instance: Guarded, tmp_path: Path) -> None:
    """Nothing runs, no process dies, memory does not grow, the counter rises, and calls go on."""
    canary = tmp_path / "canary"
    settings = Settings(redis_url=instance.url("admin"), secret=instance.secret, namespace=NAMESPACE)
    with instance.connect("admin") as client:
        assert post(instance) == (200, b"3")
        aim = table.Aim(KEYS, "Echo", read_processes(client))
        before, size = family(instance), resident(instance)
        frames = table.bad_frames(settings, "Echo", canary, aim.processes[0])
        for name, place in table.PLACES.items():
            for frame in frames.values():
                place(client, aim, frame)
            wait_until(lambda: client.xlen(KEYS.calls("Echo")) == 0)
            assert post(instance) == (200, b"3"), name
            assert family(instance) >= before, f"{name}: {instance.log('node')[-3000:]}"
        wait_until(lambda: int(cast("bytes", client.hget(KEYS.counters, "rejected_frames")) or 0) > 5 * len(frames))
        assert client.xlen(KEYS.dead_letters("Echo")) >= 4 * len(frames)
        status = instance.run("metrics", "qserve.cli", "status")
        assert status.returncode == 0, status.stderr
        table.clean_up(client, aim)
        assert resident(instance) < 1.5 * size
    assert not canary.exists()
    called = instance.run("client", "tests.faults.security.guarded_client")
    assert called.returncode == 0, called.stderr


def resident(instance: Guarded) -> int:
    """Bytes of memory of all processes."""
    return sum(psutil.Process(pid).memory_info().rss for pid in family(instance))


@pytest.mark.parametrize(
    "method",
    [
        "__init__",
        "__class__",
        "__reduce__",
        "_private",
        "os.system",
        "a.b.__class__",
        "__call__.__globals__",
        "x" * 9000,
    ],
)
def test_only_public_methods_of_the_class_are_called(instance: Guarded, method: str) -> None:
    status, body = post(instance, headers={"X-Serve-Call-Method": method})
    assert status in (400, 404, 431), body
    assert b"told" not in body


@pytest.mark.parametrize(
    "name",
    ["", "{x}", "a:b", "a b", "a/b", "*", "ä", "\0", "a\n", "x" * 64, "qs:{default}:q:Echo", "a'b", "$(id)", "%s"],
)
def test_names_cannot_change_the_meaning_of_a_key(name: str) -> None:
    assert not is_name(name)
