"""Runs in which a clock jumps by an hour while everything goes on: that of one node, or of the server.

libfaketime, preloaded, shifts the wall clock of processes and leaves their monotonic clocks alone, as setting the clock
of a machine does. It reads the shift from a file, so a clock can jump while its processes run.
"""

import importlib.util
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import NOTHING, Excuses, Fault, Injected
from tests.faults.chaos.play import Evidence, LoadRun, Run, came_true

_HOUR_S = 3600
_SHIFTS = (_HOUR_S, 0, -_HOUR_S, 0, 2)
_UNREAD = Excuses.of(once="indeterminate", stream="502 broken indeterminate")
"""An inbox expires when the server's clock jumps forward, and with it what nobody had read at that moment: a call or
two, whose callers are told at once that it may have run. Safe ones are sent again."""
_SHIFT = Path(tempfile.gettempdir()) / f"qserve-chaos-clock-{os.getpid()}"


def _library() -> Path | None:
    found = importlib.util.find_spec("libfaketime")
    if found is None or found.origin is None or platform.machine() != "x86_64":
        return None
    library = Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    return library if library.exists() else None


def _clock() -> Mapping[str, str]:
    """Variables that give processes a clock of their own, which is right while there is no file."""
    return {
        "LD_PRELOAD": str(_library()),
        "FAKETIME_TIMESTAMP_FILE": str(_SHIFT),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _set_right(_cluster: Cluster) -> None:
    _SHIFT.unlink(missing_ok=True)


class Jumps:
    """The clock goes an hour forward, back, an hour back, forward again, two seconds forward: one step each time."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._shifts = itertools.cycle(_SHIFTS)

    def __call__(self, cluster: Cluster, _dice: Random, _event: Injected) -> None:
        shift = next(self._shifts)
        written = _SHIFT.with_suffix(".new")
        written.write_text(f"{shift:+d}\n")
        written.replace(_SHIFT)

        def off_by() -> float:
            return self._now(cluster) - time.time()

        shown = came_true(lambda: abs(off_by() - shift) < 2, 10)  # a server that waits for its disk shows an old time
        assert shown, f"the clock of {self._role} was to be {shift} s off and is {off_by():.1f}"

    def _now(self, cluster: Cluster) -> float:
        if self._role == "server":
            seconds: Any = cluster.redis.time()
            return float(seconds[0])
        command, environment = (
            [sys.executable, "-c", "import time; print(time.time())"],
            cluster.environment_of(self._role),
        )
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def nobody_counts_as_dead(evidence: Evidence) -> None:
    """No call was taken from a replica that lives; one sent again because its answer was lost is a first attempt."""
    again = sum(run.attempt > 1 for call in evidence.calls.values() for run in call.runs)
    evidence.result.figures["calls taken from somebody"] = str(again)
    if again:
        evidence.fail(f"{again} calls were taken from replicas though nobody died")
    _SHIFT.unlink(missing_ok=True)


def _run(name: str, title: str, role: str, short_s: float) -> LoadRun:
    return LoadRun(
        name,
        title,
        (Fault("a jump of the clock", Jumps(role), _UNREAD if role == "server" else NOTHING),),
        every_s=8,
        seconds=150,
        short_seconds=short_s,
        setup=Setup(environment={role: _clock()}),
        prepare=_set_right,
        checks=(nobody_counts_as_dead,),
    )


RUNS: tuple[Run, ...] = (
    ()
    if _library() is None
    else (
        _run("K10-node", "the clock of one node jumps by an hour, forward and back", "node-0", 0),
        _run("K10-server", "the clock of the server jumps by an hour, forward and back", "server", 9),
    )
)
