"""`make bench`: measures every section of benchmarks/results.md, or those that are named as arguments.

To add rows: a function that measures them and returns a list of `Row`, and its line in SECTIONS.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import backlog, deployments, load, models, processes, reply_queue, rows, sockets, values
from benchmarks.rows import Row
from tests.support.serving import free_port

PEERS = processes.ROOT.parent / "shared" / "peers" / "run.py"
ROUNDS = 3
"""Bare server and qserve take turns; the table shows medians."""
LOAD_S = 5
_SETTLE_S = 5
"""After the first answer: until then processes import what they do not need for it."""
UVICORN = ["--loop", "uvloop", "--http", "httptools", "--log-level", "warning", "--no-access-log"]


class Section(NamedTuple):
    """Rows that are measured together.

    Attributes:
        title: Its heading in results.md.
        measure: Gives the rows. What it starts, it stops.
    """

    title: str
    measure: Callable[[], list[Row]]


def main() -> None:
    os.chdir(processes.ROOT)
    chosen = sys.argv[1:] or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        raise SystemExit(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    busy = os.getloadavg()[0]
    measured = {SECTIONS[name].title: SECTIONS[name].measure() for name in chosen}
    print(rows.save({title: found for title, found in measured.items() if found}, busy))
    if any(row.passed is False for found in measured.values() for row in found):
        raise SystemExit("some targets were missed")


def http_and_handles() -> list[Row]:
    """Measure one replica of Noop, signed and on the embedded Valkey, and the same handler without a queue."""
    bare_port, port = free_port(), free_port()
    bare = [sys.executable, "-m", "uvicorn", "benchmarks.bare:app", "--port", str(bare_port), *UVICORN]
    bare_url, url = f"http://127.0.0.1:{bare_port}/noop", f"http://127.0.0.1:{port}/noop"
    with tempfile.TemporaryDirectory() as runtime_dir:
        qserve = [sys.executable, "-m", "qserve.cli", "run", "examples.noop", "--port", str(port)]
        with processes.running(qserve, url, runtime_dir) as (pid, started_s):
            idle = idle_rows(pid)
            with processes.running(bare, bare_url) as (bare_pid, _):
                http = http_rows(bare_url, url, bare_pid, pid)
            handles = handle_rows(runtime_dir)
    start = Row("`qserve run examples.noop` to the first answer", f"{started_s:.2f} s", "<= 3 s", started_s <= 3)
    return [*http, *handles, start, *idle]


def http_rows(bare_url: str, url: str, bare_pid: int, pid: int) -> list[Row]:
    for each in (bare_url, url):
        load.drive(each, 16, 2)
    servers = {bare_url: processes.Parts(bare_pid), url: processes.Parts(pid)}
    runs: dict[tuple[str, int], list[load.Load]] = {}
    cpu: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for connections in (64, 1):
            for each, parts in servers.items():
                before = parts.cpu_s()
                seen = load.drive(each, connections, LOAD_S)
                requests = seen.requests_per_s * LOAD_S
                us = {part: (s - before[part]) / requests * 1e6 for part, s in parts.cpu_s().items()}
                runs.setdefault((each, connections), []).append(seen)
                cpu.setdefault((each, connections), []).append(us)
    bare_64, ours_64, bare_1, ours_1 = (
        load.median_of(runs[each, connections]) for connections in (64, 1) for each in servers
    )
    ratio_64 = ours_64.requests_per_s / bare_64.requests_per_s
    ratio_1 = ours_1.p50_ms / bare_1.p50_ms
    failed = ours_64.failed + ours_1.failed
    return [
        Row("uvicorn + Starlette alone, 64 connections", _rate(bare_64)),
        Row("gateway + queue + 1 replica, 64 connections", _rate(ours_64)),
        Row("- of the bare server's requests/s", f"{ratio_64:.2f} x", ">= 0.5 x", ratio_64 >= 0.5),
        *cpu_rows(64, cpu[bare_url, 64], cpu[url, 64], most_us=58),
        Row("uvicorn + Starlette alone, 1 connection", _rate(bare_1)),
        Row("gateway + queue + 1 replica, 1 connection", _rate(ours_1)),
        Row("- of the bare server's median", f"{ratio_1:.2f} x", "<= 2.8 x", ratio_1 <= 2.8),
        *cpu_rows(1, cpu[bare_url, 1], cpu[url, 1]),
        Row("- answers that were not 200", str(failed), "0", failed == 0),
    ]


def cpu_rows(
    connections: int, bare: list[dict[str, float]], ours: list[dict[str, float]], most_us: float | None = None
) -> list[Row]:
    """CPU time per request in microseconds, of the processes that serve it: medians of the rounds."""
    parts = {part: statistics.median(us[part] for us in ours) for part in ours[0]}
    all_us = statistics.median(sum(us.values()) for us in ours)
    bare_us = statistics.median(sum(us.values()) for us in bare)
    named = ", ".join(f"{part} {us:.1f}" for part, us in parts.items() if us >= 0.05)
    target = ("", None) if most_us is None else (f"<= {most_us} us", all_us <= most_us)
    what = "connection" if connections == 1 else "connections"
    return [
        Row(f"CPU per request, {connections} {what}", f"{all_us:.1f} us ({named})", *target),
        Row(f"- uvicorn + Starlette alone, {connections} {what}", f"{bare_us:.1f} us"),
    ]


def _rate(seen: load.Load) -> str:
    return f"{seen.requests_per_s:,.0f}/s, p50 {seen.p50_ms:.2f} ms, p99 {seen.p99_ms:.2f} ms"


def streaming() -> list[Row]:
    """Measure one replica of a FastAPI application, and the same application on uvicorn alone."""
    bare_port, port = free_port(), free_port()
    bare = [sys.executable, "-m", "uvicorn", "benchmarks.streaming:app", "--port", str(bare_port), *UVICORN]
    qserve = [sys.executable, "-m", "qserve.cli", "run", "benchmarks.streaming", "--port", str(port)]
    bare_url, url = f"http://127.0.0.1:{bare_port}", f"http://127.0.0.1:{port}/streaming"
    with (
        tempfile.TemporaryDirectory() as runtime_dir,
        processes.running(qserve, f"{url}/events", runtime_dir),
        processes.running(bare, f"{bare_url}/events"),
    ):
        bodies = body_rows(bare_url, url)
        return [*typed_rows(bare_url, url), *stream_rows(bare_url, url), *bodies, *socket_rows(url)]


def typed_rows(bare_url: str, url: str) -> list[Row]:
    body = json.dumps({"name": "Ada", "amount": 3, "tags": ["a", "b"]})
    rounds = [[load.drive(f"{each}/typed", 64, 5, body) for each in (bare_url, url)] for _ in range(ROUNDS)]
    bare, ours = (load.median_of(list(runs)) for runs in zip(*rounds, strict=True))
    ratio = ours.requests_per_s / bare.requests_per_s
    return [
        Row("FastAPI with a typed body on uvicorn alone, 64 connections", _rate(bare)),
        Row("FastAPI with a typed body as ingress, 64 connections", _rate(ours)),
        Row("- of the bare server's requests/s", f"{ratio:.2f} x", ">= 0.6 x", ratio >= 0.6),
    ]


def stream_rows(bare_url: str, url: str) -> list[Row]:
    events, bare_events = (load.drive(f"{each}/events", 16, 5).requests_per_s * 10 for each in (url, bare_url))
    down = load.drive(f"{url}/download", 8, 5).requests_per_s
    up = load.drive(f"{url}/upload", 8, 5, "x" * 2**20).requests_per_s
    return [
        Row("server-sent events, 10 per response, 16 connections", f"{events:,.0f} chunks/s (bare {bare_events:,.0f})"),
        Row("1 MiB downloads, streamed, 8 connections", f"{down:,.0f} MiB/s", ">= 200 MiB/s", down >= 200),
        Row("1 MiB uploads, streamed, 8 connections", f"{up:,.0f} MiB/s", ">= 200 MiB/s", up >= 200),
    ]


def body_rows(bare_url: str, url: str) -> list[Row]:
    """Large bodies, each way, beside the bare server."""
    rows = []
    for mib in (1, 16):
        for what, path, body in (("POST", "/whole", "x" * mib * 2**20), ("response", f"/whole/{mib}", "")):
            bare, ours = (load.drive(f"{each}{path}", 8, 4, body).requests_per_s * mib for each in (bare_url, url))
            ratio = ours / bare
            rows.append(
                Row(
                    f"{what} of {mib} MiB, 8 connections",
                    f"{ours:,.0f} MiB/s (bare {bare:,.0f}) = {ratio:.2f} x",
                    ">= 0.8 x",
                    ratio >= 0.8,
                )
            )
    return rows


def socket_rows(url: str) -> list[Row]:
    seen = sockets.drive(f"{url}/echo", 500, 5)
    return [Row("500 WebSocket clients, echo", f"{seen.messages_per_s:,.0f} messages/s, p99 {seen.p99_ms:.0f} ms")]


def measure_handles(runtime_dir: str) -> dict[str, float]:
    """Run benchmarks/handles.py in a process of its own, on the running instance."""
    environment = processes.environment(runtime_dir)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.handles"], check=False, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"benchmarks.handles failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def handle_rows(runtime_dir: str) -> list[Row]:
    figures = measure_handles(runtime_dir)
    pipelined, sync, single = figures["async_pipelined"], figures["sync_pipelined"], figures["one_by_one_ms"]
    return [
        Row("handle, async pipelined", f"{pipelined:,.0f} calls/s", ">= 40,000 calls/s", pipelined >= 40_000),
        Row("handle, sync `remote()` + `get` pipelined", f"{sync:,.0f} calls/s", ">= 8,000 calls/s", sync >= 8_000),
        Row("handle, sync, one by one (median)", f"{single:.2f} ms", "<= 0.4 ms", single <= 0.4),
    ]


def sleepers_and_burners() -> list[Row]:
    """Measure the deployments of benchmarks/apps.py."""
    port = free_port()
    command = [sys.executable, "-m", "qserve.cli", "run", "benchmarks.apps", "--port", str(port)]
    with (
        tempfile.TemporaryDirectory() as runtime_dir,
        processes.running(command, f"http://127.0.0.1:{port}/-/routes", runtime_dir),
    ):
        figures = measure_handles(runtime_dir)
        plain = load.median_of([load.drive(f"http://127.0.0.1:{port}/plain", 64, LOAD_S) for _ in range(ROUNDS)])
    seconds, one, two = figures["thousand_sleepers_s"], figures["one_burner_per_s"], figures["two_burners_per_s"]
    return [
        Row("1,000 calls that sleep 100 ms, 1 async replica", f"{seconds:.2f} s", "<= 0.4 s", seconds <= 0.4),
        Row("a `def` that does nothing, one at a time, 1 replica, 64 connections", _rate(plain)),
        Row("20 ms CPU-bound `def`, 1 replica", f"{one:.1f} calls/s"),
        Row(
            "20 ms CPU-bound `def`, 2 replicas", f"{two:.1f} calls/s = {two / one:.2f} x", ">= 1.8 x", two / one >= 1.8
        ),
    ]


def idle_rows(pid: int) -> list[Row]:
    """Measure memory and CPU of an instance that nobody has called yet."""
    time.sleep(_SETTLE_S)
    parts = processes.Parts(pid)
    cpu = processes.cpu_percent(processes.tree(pid), 10)
    pss = parts.pss_mib()
    command_mib = pss.pop(processes.COMMAND, 0)
    total = sum(pss.values())
    named = ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(pss.items()))
    return [
        Row("idle memory (PSS)", f"{total:.0f} MiB ({named})", "<= 220 MiB", total <= 220),
        Row("- the `qserve run` command and its node besides", f"{command_mib:.0f} MiB"),
        Row("idle CPU, all processes", f"{cpu:.1f} % of a core", "< 2 %", cpu < 2),
    ]


def reply_list_or_stream() -> list[Row]:
    """Measure replies alone, by list and by stream: the price of replies that a broken read does not lose."""
    return [
        Row(
            f"replies, {batch} per script: stream against list",
            f"{through_stream:,.0f}/s against {through_list:,.0f}/s = {through_stream / through_list:.2f}x",
        )
        for batch, (through_list, through_stream) in reply_queue.run().items()
    ]


def backlogs() -> list[Row]:
    """Measure memory per queued call, and whether putting, answering and taking over get slower as a queue grows."""
    short, *longer = backlog.run()
    rows = [Row(f"{short.length:,} calls queued", _backlog(short))]
    for each in longer:
        lowest = min(
            each.admitted_per_s / short.admitted_per_s,
            each.answered_per_s / short.answered_per_s,
            each.taken_per_s / short.taken_per_s,
        )
        small, quick = each.bytes_each < 1.2 * 1024, lowest >= 0.8
        rows += [
            Row(f"{each.length:,} calls queued", _backlog(each), "< 1.2 KiB per call", small),
            Row(f"- lowest of these rates against {short.length:,} queued", f"{lowest:.2f} x", ">= 0.8 x", quick),
        ]
    return rows


def _backlog(seen: backlog.Backlog) -> str:
    rates = f"ADMIT {seen.admitted_per_s:,.0f}/s, read and REPLY {seen.answered_per_s:,.0f}/s"
    return f"{seen.bytes_each:,.0f} bytes per call, {rates}, TAKE {seen.taken_per_s:,.0f}/s"


def peers() -> list[Row]:
    """Measure what users could choose instead, with the same work, if BENCH_PEERS names their environments."""
    environments = os.environ.get("BENCH_PEERS")
    if not environments:
        return []
    if not PEERS.exists():
        return [Row("peers", f"{PEERS.name} not found beside this checkout")]
    done = subprocess.run([sys.executable, str(PEERS), environments], check=False, capture_output=True, text=True)
    rows = [peer_row(line) for line in done.stdout.splitlines()[1:] if line.strip()]
    return rows or [Row("peers", f"did not run: {done.stderr.strip()[-200:]}")]


def peer_row(line: str) -> Row:
    name, *cells = line.replace("|", " ").split()
    if len(cells) < 6 or not cells[0].replace(".", "").isdigit():
        return Row(f"peer {name}", " ".join(cells))
    rate_1, p50_1, _, rate_64, p50_64, p99_64 = cells[:6]
    single = f"1 connection: {float(rate_1):,.0f}/s, p50 {p50_1}"
    return Row(f"peer {name}", f"64 connections: {float(rate_64):,.0f}/s, p50 {p50_64}, p99 {p99_64}; {single}")


SECTIONS = {
    "calls": Section("Calls", http_and_handles),
    "streaming": Section("Streams, bodies and typed applications", streaming),
    "values": Section("Large values", values.measure),
    "concurrency": Section("Calls that wait and calls that compute", sleepers_and_burners),
    "deployments": Section("Many small deployments", deployments.measure),
    "models": Section("Many models in few replicas", models.measure),
    "replies": Section("Replies by list and by stream", reply_list_or_stream),
    "queues": Section("Long queues", backlogs),
    "peers": Section("Peers", peers),
}


if __name__ == "__main__":
    main()
