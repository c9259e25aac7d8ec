"""HTTP load: from wrk if it is installed, otherwise from a small client of our own, which reaches its limit earlier."""

import asyncio
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

_JSON = "application/json"


@dataclass(frozen=True)
class Load:
    """The figures of one run of the load generator."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int


def client_name() -> str:
    """The load generator in use, for the head of the table."""
    return "wrk -t1" if shutil.which("wrk") else "built-in client (wrk is not installed)"


def drive(url: str, connections: int, seconds: float, body: str = "") -> Load:
    """Send requests over a number of connections; each waits for its answer before it sends the next.

    Args:
        body: JSON to POST; without it, requests are GET.
    """
    if wrk := shutil.which("wrk"):
        return _wrk(wrk, url, connections, seconds, body)
    return asyncio.run(_own_client(url, connections, seconds, body.encode()))


def median_of(loads: list[Load]) -> Load:
    """The median of each figure over several runs."""
    return Load(
        statistics.median(load.requests_per_s for load in loads),
        statistics.median(load.p50_ms for load in loads),
        statistics.median(load.p99_ms for load in loads),
        sum(load.failed for load in loads),
    )


def _wrk(wrk: str, url: str, connections: int, seconds: float, body: str) -> Load:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        if body:
            script.write(f'wrk.method = "POST"; wrk.body = [[{body}]]; wrk.headers["content-type"] = "{_JSON}"')
        script.flush()
        command = [wrk, "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", "-s", script.name, url]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    failures = re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert rate, text
    return Load(float(rate[1]), _latency_ms(text, 50), _latency_ms(text, 99), sum(map(int, failures)))


def _latency_ms(text: str, percentile: int) -> float:
    found = re.search(rf"(?m)^\s+{percentile}%\s+([\d.]+)(us|ms|s)\s*$", text)
    assert found, text
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


async def _own_client(url: str, connections: int, seconds: float, body: bytes) -> Load:
    parts = urlsplit(url)
    method, length = ("POST", f"content-length: {len(body)}\r\ncontent-type: {_JSON}\r\n") if body else ("GET", "")
    request = f"{method} {parts.path or '/'} HTTP/1.1\r\nhost: {parts.netloc}\r\n{length}\r\n".encode() + body
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def connection() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=4 * 1024 * 1024)
        while (began := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if length := re.search(rb"(?i)content-length: (\d+)", head):
                await reader.readexactly(int(length[1]))
            else:
                await reader.readuntil(b"0\r\n\r\n")
            times.append((time.perf_counter() - began) * 1000)
            failed += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    cuts = statistics.quantiles(times, n=100)
    return Load(len(times) / seconds, cuts[49], cuts[98], failed)
