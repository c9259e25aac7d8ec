"""The processes that the benchmark starts, and the memory and CPU time that they use, from /proc."""

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
COMMAND = "`qserve run` and node"
_PARTS = {
    "qserve_gateway": "gateway",
    "qserve: gateway": "gateway",
    "qserve: template": "template",
    "qserve_workers.template": "template",
    "qserve: worker": "worker and replica",
    "qserve: replica": "worker and replica",
    "valkey-server": "Valkey",
}
"""What the command line of a process has in it -> what the tables call it."""


def environment(runtime_dir: str | None = None) -> dict[str, str]:
    """The environment of this process without settings of qserve; the folder is where instances are looked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}
    return {**kept, "QSERVE_RUNTIME_DIR": runtime_dir} if runtime_dir else kept


@contextmanager
def running(command: list[str], ready_url: str, runtime_dir: str | None = None) -> Iterator[tuple[int, float]]:
    """Run a server, and yield its pid and the seconds until its first good answer."""
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
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def pss_mib(pid: int) -> float:
    """The proportional share of memory (PSS) of a process, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024


class Parts:
    """The processes below one, as they are now, and what each kind of them uses.

    Args:
        pid: The process that has started them, which is a part as well.
    """

    def __init__(self, pid: int) -> None:
        self._pids: dict[str, list[int]] = {}
        for each in tree(pid):
            command = command_line(each)
            part = next((name for word, name in _PARTS.items() if word in command), COMMAND)
            self._pids.setdefault(part, []).append(each)

    def cpu_s(self) -> dict[str, float]:
        """Seconds of processor time so far, by part."""
        return {part: _cpu_ticks(pids) / os.sysconf("SC_CLK_TCK") for part, pids in self._pids.items()}

    def pss_mib(self) -> dict[str, float]:
        """MiB of memory (PSS), by part."""
        return {part: sum(map(pss_mib, pids)) for part, pids in self._pids.items()}


def cpu_percent(pids: list[int], seconds: float) -> float:
    """The CPU time that processes use over an interval, in percent of one core."""
    before = _cpu_ticks(pids)
    time.sleep(seconds)
    return (_cpu_ticks(pids) - before) / os.sysconf("SC_CLK_TCK") / seconds * 100


def _cpu_ticks(pids: list[int]) -> int:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields)
