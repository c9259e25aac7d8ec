"""Processes the benchmark starts and what they use, read from /proc."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(runtime_dir: str | None = None) -> dict[str, str]:
    """This process' environment without its qserve settings; instances are looked for in the folder named."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}
    return {**kept, "QSERVE_RUNTIME_DIR": runtime_dir} if runtime_dir else kept


@contextmanager
def running(command: list[str], ready_url: str, runtime_dir: str | None = None) -> Iterator[tuple[int, float]]:
    """Runs a server; yields its pid and the seconds to its first good answer."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment(runtime_dir), stdout=output, stderr=output)
        try:
            _wait_for(ready_url, process, 60)
            yield process.pid, time.perf_counter() - began
        except TimeoutError as error:
            output.seek(0)
            raise SystemExit(f"{error}\n{output.read().decode()[-3000:]}") from error
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                print(f"{command[0]} did not stop within 40 s and was killed", file=sys.stderr)


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.01)
        else:
            return
    raise TimeoutError(f"{url} did not answer")


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def command_line(pid: int) -> str:
    """The command of a process, for telling what it is."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def pss_mib(pid: int) -> float:
    """A process's proportional share of memory."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024


def cpu_percent(pids: list[int], seconds: float) -> float:
    """CPU use of processes over an interval, in percent of one core."""
    before = _cpu_ticks(pids)
    time.sleep(seconds)
    return (_cpu_ticks(pids) - before) / os.sysconf("SC_CLK_TCK") / seconds * 100


def _cpu_ticks(pids: list[int]) -> int:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields)
