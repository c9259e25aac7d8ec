"""HTTP load: wrk where it is installed, else a small client of our own (one process, so it tops out earlier)."""

import asyncio
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Load:
    """What one run of the load generator saw."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int


def client_name() -> str:
    """The load generator in use, for the head of the table."""
    return "wrk -t1" if shutil.which("wrk") else "built-in client (wrk is not installed)"


def drive(url: str, connections: int, seconds: float) -> Load:
    """Sends GET requests over so many connections, each waiting for its answer before the next."""
    if wrk := shutil.which("wrk"):
        return _wrk(wrk, url, connections, seconds)
    return asyncio.run(_own_client(url, connections, seconds))


def median_of(loads: list[Load]) -> Load:
    """The median of each figure over several runs."""
    return Load(
        statistics.median(load.requests_per_s for load in loads),
        statistics.median(load.p50_ms for load in loads),
        statistics.median(load.p99_ms for load in loads),
        sum(load.failed for load in loads),
    )


def _wrk(wrk: str, url: str, connections: int, seconds: float) -> Load:
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    failures = re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert rate, text
    return Load(float(rate[1]), _latency_ms(text, 50), _latency_ms(text, 99), sum(map(int, failures)))


def _latency_ms(text: str, percentile: int) -> float:
    found = re.search(rf"(?m)^\s+{percentile}%\s+([\d.]+)(us|ms|s)$", text)
    assert found, text
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


async def _own_client(url: str, connections: int, seconds: float) -> Load:
    parts = urlsplit(url)
    request = f"GET {parts.path or '/'} HTTP/1.1\r\nhost: {parts.netloc}\r\n\r\n".encode()
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def connection() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        while (began := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            times.append((time.perf_counter() - began) * 1000)
            failed += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    cuts = statistics.quantiles(times, n=100)
    return Load(len(times) / seconds, cuts[49], cuts[98], failed)
