"""The GPUs of this machine, and which replica has which share of them.

Shares stand in a file of this user's, each with the process that has it, so that those of one that has ended, however
it did, are free at once, and all nodes of the machine count together.
"""

import asyncio
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from qserve.errors import ConfigurationError
from qserve.this_machine import runtime_folder, started_at

logger = logging.getLogger(__name__)

VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
WHOLE: Final = 10_000
"""The share of a whole GPU; shares are whole numbers, so that they add up."""


class GpuShare(NamedTuple):
    """What a replica has got.

    Attributes:
        ids: The GPUs, as CUDA names them.
        of_each: Which part of each of them.
    """

    ids: tuple[str, ...]
    of_each: float

    def __str__(self) -> str:
        part = "" if self.of_each == 1 else f" ({self.of_each:g})"
        return ",".join(self.ids) + part


class NoGpuFree(Exception):
    """All that there are, are in use."""


def gpus_here(setting: str, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that replicas of this node may use: those that QSERVE_GPUS names, else those that CUDA_VISIBLE_DEVICES
    leaves to it, else all that the driver knows, if nvidia-ml-py is installed."""
    given = setting or environment.get(VARIABLE)
    if given is not None:
        return tuple(each.strip() for each in given.split(",") if each.strip() not in ("", "-1"))
    try:
        import pynvml  # noqa: PLC0415  few machines have it
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        count: int = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as exc:
        logger.debug("the driver tells of no GPU: %s", exc)
        return ()
    return tuple(map(str, range(count)))


class GpuLedger:
    """Who has which share of the GPUs of this machine.

    Args:
        gpus: Those that may be used from here.
    """

    def __init__(self, gpus: tuple[str, ...], folder: Path | None = None) -> None:
        self.gpus = gpus
        self._file = (folder or runtime_folder()) / "gpus.json"

    def take(self, wanted: float, pid: int) -> GpuShare:
        """Give a process a share, for as long as it lives.

        Args:
            wanted: A whole number of GPUs, or a part of one.

        Raises:
            NoGpuFree: There is no room for it now.
            ConfigurationError: There will never be.
        """
        if wanted > len(self.gpus):
            known = f"it has {len(self.gpus)}: {', '.join(self.gpus)}" if self.gpus else "it has none"
            raise ConfigurationError(
                f"a replica needs {_gpus(wanted)}, and on this node {known}. QSERVE_GPUS=0,1 says which there are, or "
                f"{VARIABLE} of the node; where nvidia-ml-py is installed, the driver is asked. Start nodes without "
                "GPUs with --only and what they can run"
            )
        with self._locked() as entries:
            used: Counter[str] = Counter()
            for entry in entries:
                used.update(entry["shares"])
            number, units = (1, round(wanted * WHOLE)) if wanted < 1 else (int(wanted), WHOLE)
            free = [gpu for gpu in self.gpus if used[gpu] + units <= WHOLE]
            if len(free) < number:
                raise NoGpuFree(f"waits for {_gpus(wanted)}: {self._in_use(used)}")
            # The fullest that still has room: so whole ones stay free for those who need one.
            chosen = sorted(free, key=lambda gpu: -used[gpu])[:number]
            entries.append({"pid": pid, "started": started_at(pid), "shares": dict.fromkeys(chosen, units)})
        return GpuShare(tuple(gpu for gpu in self.gpus if gpu in chosen), units / WHOLE)

    def _in_use(self, used: Counter[str]) -> str:
        taken = sum(used[gpu] for gpu in self.gpus) / WHOLE
        return f"{taken:g} of {len(self.gpus)} in use"

    @contextmanager
    def _locked(self) -> Iterator[list[dict[str, Any]]]:
        """The entries of processes that live; written back where that is left without an error."""
        with self._file.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            try:
                entries = json.loads(file.read() or "[]")
            except ValueError:  # its writer was killed
                entries = []
            living = [entry for entry in entries if entry["started"] and started_at(entry["pid"]) == entry["started"]]
            yield living
            file.seek(0)
            file.truncate()
            file.write(json.dumps(living))


async def wait_for_gpus(
    ledger: GpuLedger, wanted: float, on_wait: Callable[[str], None], pause: Callable[[], Awaitable[bool]]
) -> GpuShare | None:
    """Take a share as soon as there is room, and let the CUDA of this process see only that.

    Args:
        on_wait: Gets what it waits for, at each look.
        pause: Waits until it is time to look again; False: nobody wants the share any more.

    Raises:
        ConfigurationError: There will never be room.
    """
    while True:
        try:
            share = await asyncio.to_thread(ledger.take, wanted, os.getpid())
        except NoGpuFree as exc:
            on_wait(str(exc))
            if not await pause():
                return None
            continue
        os.environ[VARIABLE] = ",".join(share.ids)
        return share


def _gpus(number: float) -> str:
    return f"{number:g} GPU{'s' if number > 1 else ''}"
