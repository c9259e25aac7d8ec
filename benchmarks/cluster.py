"""What a call costs where Redis is a cluster: `python -m benchmarks.cluster [ROW ...]`; see benchmarks/cluster.md.

Six deployments that do nothing are called in turn over HTTP. The same load goes to an instance on one server, and on
clusters of one, three and six servers; the processor time of all processes is added up for each. A row is "one", or a
number of servers and one of shards, such as "3/16".
"""

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import Parts, environment
from benchmarks.rows import machine
from qserve.broker.keys import Keys
from qserve.broker.server import embedded
from qserve.broker.server.address import SHARDS, parse
from tests.support.cluster import Cluster
from tests.support.servers import wait_until_accepting
from tests.support.serving import free_port
from tests.support.waiting import wait_until

_NAMES = [f"Noop{number}" for number in range(6)]
_ROWS = ("one", f"1/{SHARDS}", f"3/{SHARDS}", f"6/{SHARDS}")
"""Servers and shards of the clusters."""
_CONNECTIONS, _SECONDS, _ROUNDS = 64, 6, 3
_FEW = 8
_APP = "from qserve import serve\n" + "".join(
    f"""
@serve.deployment(version="1")
class {name}:
    async def __call__(self) -> str:
        return "ok"
"""
    for name in _NAMES
)
_SCRIPT = """
local names, number = {%s}, 0
request = function()
  number = number %% #names + 1
  return wrk.format("GET", "/" .. names[number])
end
"""


class Measured(NamedTuple):
    """One run of the load: requests a second, milliseconds, and microseconds of processor time for a request."""

    rate: float
    p50_ms: float
    p99_ms: float
    failed: int
    cpu_us: dict[str, float]


class Serving:
    """An instance with a gateway and a replica of each deployment."""

    def __init__(self, url: str, servers: list[int]) -> None:
        self._folder = tempfile.mkdtemp(prefix="qs-")
        (Path(self._folder) / "noops.py").write_text(_APP)
        self._environment = environment(self._folder) | {"QSERVE_REDIS_URL": url}
        self.servers = servers
        self.port = free_port()
        command = ["start", "--gateway", "--port", str(self.port), "--replicas-per-node", "1"]
        self._node = self._start(*command)
        wait_until(self._answers)
        self._start("deploy", "noops").wait(60)

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "qserve.cli", *arguments]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=self._folder, env=self._environment, stdout=quiet, stderr=quiet)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/readyz", timeout=2).status == 200)
        return False

    def measure(self, names: list[str], connections: int, seconds: int) -> Measured:
        """Call these deployments in turn."""
        before = self._cpu_s()
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            script.write(_SCRIPT % ", ".join(f'"{name}"' for name in names))
            script.flush()
            command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script.name]
            text = subprocess.run(
                [*command, f"http://127.0.0.1:{self.port}"], capture_output=True, text=True, check=True
            ).stdout
        after = self._cpu_s()
        done = int(re.search(r"(\d+) requests in", text)[1])  # type: ignore[index]
        failed = sum(map(int, re.findall(r"(?:read|write|timeout|responses:) (\d+)", text)))
        cpu_us = {part: (after[part] - before[part]) / done * 1e6 for part in after}
        return Measured(done / seconds, _percentile(text, 50), _percentile(text, 99), failed, cpu_us)

    def _cpu_s(self) -> dict[str, float]:
        found = _parts(self._node.pid)
        servers = sum(_parts(pid).get("Valkey", 0.0) for pid in self.servers)
        parts = ("gateway", "worker and replica")
        return {part: found.get(part, 0.0) for part in parts} | {"servers": servers}

    def stop(self) -> None:
        self._node.send_signal(signal.SIGINT)
        self._node.wait(60)
        shutil.rmtree(self._folder)


def _parts(pid: int) -> dict[str, float]:
    while True:
        with contextlib.suppress(FileNotFoundError):  # a process that has just ended
            return Parts(pid).cpu_s()


def _percentile(text: str, percentile: int) -> float:
    found = re.search(rf"(?m)^\s+{percentile}%\s+([\d.]+)(us|ms|s)\s*$", text)
    assert found, text
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


@contextlib.contextmanager
def _one_server() -> Iterator[Serving]:
    folder = tempfile.mkdtemp(prefix="qs-")
    port = free_port()
    server = subprocess.Popen([*embedded.command(Path(folder)), "--port", str(port), "--bind", "127.0.0.1"])
    try:
        wait_until_accepting(embedded.socket_path(Path(folder)), server)
        serving = Serving(f"redis://127.0.0.1:{port}", [server.pid])
        try:
            yield serving
        finally:
            serving.stop()
    finally:
        server.kill()
        shutil.rmtree(folder)


@contextlib.contextmanager
def _cluster(size: int, shards: int) -> Iterator[tuple[Cluster, Serving]]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    cluster = Cluster(folder, size, replicas=False)
    try:
        cluster.start()
        serving = Serving(f"{cluster.url}/?shards={shards}", [node.process.pid for node in cluster.nodes])
        try:
            yield cluster, serving
        finally:
            serving.stop()
    finally:
        cluster.kill()
        shutil.rmtree(folder)


def _row(what: str, serving: Serving, connections: int = _CONNECTIONS) -> str:
    serving.measure(_NAMES, connections, 2)
    runs = [serving.measure(_NAMES, connections, _SECONDS) for _ in range(_ROUNDS)]
    assert not any(run.failed for run in runs), runs
    cpu = {part: statistics.median(run.cpu_us[part] for run in runs) for part in runs[0].cpu_us}
    figures = [
        f"{statistics.median(run.rate for run in runs):,.0f}",
        f"{statistics.median(r.p50_ms for r in runs):.1f}",
    ]
    figures += [f"{cpu[part]:.0f}" for part in ("gateway", "worker and replica", "servers")]
    return f"| {what} | {connections} | {' | '.join(figures)} | {sum(cpu.values()):.0f} |"


def _one_down(cluster: Cluster, serving: Serving) -> str:
    keys = Keys("default", SHARDS)
    slots = {name: parse(keys.of(name).address(cluster.url)).slot for name in _NAMES}
    home = cluster.primary_of(parse(keys.address(cluster.url)).slot)
    victim = next(node for node in map(cluster.primary_of, slots.values()) if node is not home)
    others = [name for name in _NAMES if cluster.primary_of(slots[name]) is not victim]
    before = serving.measure(others, _FEW, _SECONDS)
    serving.servers.remove(victim.process.pid)
    victim.kill()
    time.sleep(2)
    meanwhile = serving.measure(others, _FEW, _SECONDS)
    assert not meanwhile.failed
    began = time.monotonic()
    with contextlib.suppress(OSError):
        name = next(name for name in _NAMES if name not in others)
        urllib.request.urlopen(f"http://127.0.0.1:{serving.port}/{name}", timeout=20)
    return (
        f"With {_FEW} connections the calls to {len(others)} deployments on two of three servers took "
        f"{before.p50_ms:.2f} ms (p50) and {before.p99_ms:.2f} ms (p99), and {meanwhile.p50_ms:.2f} and "
        f"{meanwhile.p99_ms:.2f} ms while the third was down. A call to a deployment there was refused with 503 after "
        f"{(time.monotonic() - began) * 1000:.0f} ms."
    )


def main() -> None:
    """Measure everything, and print the tables."""
    print("# One instance over several servers\n")
    print(f"Measured with `python -m benchmarks.cluster`: {machine()}\n")
    print("Six deployments that do nothing, called in turn over HTTP (`wrk -t1`), one gateway, one replica each;")
    print(f"{_CONNECTIONS} connections, and as many for each server. Medians of {_ROUNDS} runs of {_SECONDS} s. All")
    print(
        "processes share the processors, so the rate does not grow with the servers here; what can be compared is the"
    )
    print("processor time of a request.\n")
    print("| Redis | connections | requests/s | p50 ms | gateway us | replicas us | servers us | all us |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    down = ""
    for what in sys.argv[1:] or _ROWS:
        if what == "one":
            with _one_server() as serving:
                print(_row("one server", serving), flush=True)
            continue
        size, _, shards = what.partition("/")
        with _cluster(int(size), int(shards)) as (cluster, serving):
            print(_row(f"cluster of {size}, {shards} shards", serving), flush=True)
            if int(size) > 1:
                print(_row(f"cluster of {size}, {shards} shards", serving, _CONNECTIONS * int(size)), flush=True)
            if what == f"3/{SHARDS}":
                down = _one_down(cluster, serving)
    if down:
        print(f"\n## One server down\n\n{down}")


if __name__ == "__main__":
    os.environ.pop("QSERVE_REDIS_URL", None)
    main()
