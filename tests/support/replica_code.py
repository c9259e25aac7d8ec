"""What the replicas of tests/process/test_replica.py run; notes every start and end in a file."""

import asyncio
import os
import signal
import time
from pathlib import Path

from qserve import serve
from qserve.calls.handle import get_handle
from tests.support.gates import Gate, Notes

GPUS_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")


class Books:
    """The files of a test: gates, and notes of the form `START name pid` and `END name pid`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.gate = Gate(folder / "gate")
        self.fuse = Gate(folder / "fuse")
        self.notes = Notes(folder / "notes")

    def says(self, word: str) -> bool:
        """Whether the test has said so."""
        return (self._folder / word).exists()

    def say(self, word: str) -> None:
        """What the code finds out by `says`."""
        (self._folder / word).touch()

    def unsay(self, word: str) -> None:
        """It is not so any more."""
        (self._folder / word).unlink()

    def start(self, name: object) -> None:
        self.notes.add(f"START {name} {os.getpid()}")

    def end(self, name: object) -> None:
        self.notes.add(f"END {name} {os.getpid()}")

    def starts(self, name: object = None) -> list[int]:
        """Pids that started a call, of that name or any."""
        lines = (line.split() for line in self.notes.read())
        return [int(pid) for what, which, pid in lines if what == "START" and name in (None, which)]

    def ended(self) -> list[str]:
        """Names of the calls that ended."""
        return [line.split()[1] for line in self.notes.read() if line.startswith("END")]


class Local(Exception):
    """Cannot be rebuilt by whoever does not know this module: it needs two arguments."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__("local")
        self.both = first, second


class Code:
    """Async code."""

    def __init__(self, folder: str) -> None:
        self.books = Books(Path(folder))
        self.config: object = None

    def reconfigure(self, config: object) -> None:
        self.config = config

    async def __call__(self, request: object) -> str:
        return await self.wait("http")

    async def pid(self, name: object = None) -> int:
        return os.getpid()

    async def gpus(self, name: object = None) -> str | None:
        return GPUS_AT_IMPORT

    async def wait(self, name: str) -> str:
        self.books.start(name)
        await self.books.gate.passed()
        self.books.end(name)
        return name

    async def leave_a_child(self, name: object = None) -> int:
        """A process that lives on when its replica has died."""
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.pause()
            os._exit(0)
        return pid

    def wait_on_thread(self, name: str) -> str:
        self.books.start(name)
        self.books.gate.pass_through()
        self.books.end(name)
        return name

    async def die(self, name: str) -> None:
        self.books.start(name)
        await self.books.fuse.passed()
        os._exit(9)

    async def stall(self, seconds: float) -> None:
        self.books.start("stall")
        time.sleep(seconds)  # noqa: ASYNC251 the mistake under test

    async def stall_until_told(self, name: str) -> None:
        self.books.gate.pass_through()

    async def get_config(self, name: object = None) -> object:
        self.books.start(name)
        before = self.config
        await self.books.gate.passed()
        return [before, self.config]

    async def result(self, kind: str) -> object:
        if kind == "lock":
            return asyncio.get_running_loop()
        if kind == "large":
            return bytes(17 * 1024 * 1024)
        raise Local(1, 2)


class OneByOne:
    """Sync code only."""

    def __init__(self, folder: str) -> None:
        self.books = Books(Path(folder))

    def __call__(self, name: str) -> str:
        self.books.start(name)
        if name == "slow":
            self.books.gate.pass_through()
        return name


class Zoo(Code):
    """Keeps two models, and notes which it loads."""

    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, model: str) -> str:
        self.books.start(f"load-{model}")
        return model

    async def look(self, name: str) -> int:
        await self.load(serve.get_multiplexed_model_id())
        return os.getpid()

    async def stay(self, name: str) -> int:
        await self.load(serve.get_multiplexed_model_id())
        await self.wait(name)
        return os.getpid()


class Patient(Code):
    """Ill, or stuck in its check, when there are files that say so."""

    async def check_health(self) -> None:
        self.books.start("check")
        if self.books.says("ill"):
            raise RuntimeError("no connection")
        while self.books.says("stuck"):  # noqa: ASYNC110 another process says so
            await asyncio.sleep(0.01)


class Stuck(Code):
    """Does not get over one of its configs."""

    async def reconfigure(self, config: object) -> None:  # type: ignore[override]
        if config == "new":
            await self.wait("reconfigure")
        self.config = config


class Parting(Code):
    """Takes its time to go."""

    async def __del__(self) -> None:
        await self.wait("goodbye")


class SyncPatient:
    """Sync code only, with a check of its own."""

    def __init__(self, folder: str) -> None:
        self.books = Books(Path(folder))

    def wait(self, name: str) -> str:
        self.books.start(name)
        self.books.gate.pass_through()
        return name

    def check_health(self) -> None:
        self.books.start("check")
        while self.books.says("stuck"):
            time.sleep(0.01)


class Firing:
    """Sync code only, which makes a call to its own deployment and does not wait for it."""

    def __init__(self, folder: str) -> None:
        self.books = Books(Path(folder))

    def __call__(self, name: str) -> str:
        self.books.start(name)
        if name == "first":
            get_handle("Code").remote("fired")
            self.books.start("after")
            self.books.gate.pass_through()
        return name
