"""What more nodes cost the server that they share: a section of `benchmarks.fleet`."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import redis

from benchmarks import processes, small
from benchmarks.rows import Row
from qserve import serve
from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.settings import Settings
from qserve.wire.codec import Codec
from tests.support.waiting import wait_until

NODES = (1, 2, 4)
DEPLOYMENTS = 10
"""Each with a replica on every node."""
_SETTLE_S, _IDLE_S = 10.0, 12.0
_DEPLOYS = 5


def growth(settings: Settings, state: State) -> list[Row]:
    """Commands of an instance that nobody calls, and of a deploy, by the number of nodes."""
    client = redis.Redis.from_url(settings.redis_url)
    idle, cpu, deploy = {}, {}, {}
    with contextlib.ExitStack() as nodes, contextlib.closing(client):
        running = 0
        for count in NODES:
            for _ in range(count - running):
                nodes.enter_context(_node(settings))
            running = count
            wait_until(partial(_has_nodes, state, count))
            for number in range(DEPLOYMENTS):
                _deploy(state, f"known{number}", "1")
            time.sleep(_SETTLE_S)
            before, used = _commands(client), _cpu_s(client)
            time.sleep(_IDLE_S)
            idle[count] = (_commands(client) - before) / _IDLE_S
            cpu[count] = (_cpu_s(client) - used) / _IDLE_S
            before, began = _commands(client), time.monotonic()
            for number in range(_DEPLOYS):
                _deploy(state, "known0", f"{count}.{number}")
            deploy[count] = (_commands(client) - before - idle[count] * (time.monotonic() - began)) / _DEPLOYS
        for name in state.list():
            state.delete(name)
    return [
        _row(f"commands a second, {DEPLOYMENTS} deployments with a replica on each node, nobody calls", idle, "{:.0f}"),
        _row("part of a core that the server takes for them", cpu, "{:.1%}"),
        _row("commands of one deploy, until each node serves it", deploy, "{:.0f}"),
    ]


def _row(what: str, found: dict[int, float], form: str) -> Row:
    each = {count: value / count for count, value in found.items()}
    text = ", ".join(f"{form.format(value)} ({count} node{'s' if count > 1 else ''})" for count, value in found.items())
    few, many = each[NODES[1]], each[NODES[-1]]  # on a single node each replica is alone, and rests
    return Row(what, text, f"{NODES[-1]} <= 1.2 x {NODES[1]}, for each node", many <= 1.2 * few)


def _has_nodes(state: State, count: int) -> bool:
    return len(state.observed.nodes()) == count


def _deploy(state: State, name: str, version: str) -> None:
    spec = serve.deployment(name=name, version=version)(small.answer).to_spec(Codec(allow_pickle=True, max_bytes=2**20))
    deploying.deploy(state, spec).wait(120)


def _commands(client: "redis.Redis") -> int:
    found: int = client.info("stats")["total_commands_processed"]
    return found


def _cpu_s(client: "redis.Redis") -> float:
    found: dict[str, float] = client.info("cpu")
    return found["used_cpu_user"] + found["used_cpu_sys"]


@contextlib.contextmanager
def _node(settings: Settings) -> Iterator[None]:
    given = {"QSERVE_REDIS_URL": settings.redis_url, "QSERVE_SECRET": settings.secret}
    node = subprocess.Popen(
        [sys.executable, "-m", "qserve_workers.node"], env=processes.environment() | given, cwd=processes.ROOT
    )
    try:
        yield
    finally:
        node.terminate()
        node.wait(60)
