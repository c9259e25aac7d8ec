"""User code that relies on what every Python process has; imported by replicas, and by the processes these start."""

import asyncio
import atexit
import contextlib
import faulthandler
import logging
import logging.config
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from celery import Celery, shared_task
from starlette.requests import Request

from qserve_workers.pool import child_signals

project = Celery("project", broker="memory://", backend="cache+memory://")
project.conf.task_always_eager = True

_SIGNALS = """
import signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


@shared_task  # type: ignore[untyped-decorator]
def add(a: int, b: int) -> int:
    return a + b


@project.task  # type: ignore[untyped-decorator]
def multiply(a: int, b: int) -> int:
    return a * b


def square(x: int) -> int:
    return x * x


def tell_signals(pipe: Any) -> None:
    handlers = {signum: signal.getsignal(signum) for signum in child_signals.ALL}
    pipe.send([handler == signal.SIG_DFL for handler in handlers.values()] + [signal.set_wakeup_fd(-1)])


class Dumping:
    """Can be asked by signals where its threads are."""

    def __init__(self) -> None:
        for signum in (signal.SIGUSR1, signal.SIGUSR2):
            faulthandler.register(signum, file=2)

    def __call__(self) -> int:
        return os.getpid()


class Processes:
    """Starts other processes in all the ways that Python has."""

    def stop_here(self) -> None:
        breakpoint()

    def executor(self, method: str) -> list[int]:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as executor:
            return list(executor.map(square, range(4)))

    def pool(self, method: str) -> list[int]:
        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(square, range(4))

    def manager(self) -> list[int]:
        with multiprocessing.Manager() as manager:
            shared = manager.list([1, 2])
            shared.append(3)
            return list(shared)

    def terminated(self, method: str) -> int | None:
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(30)
        code: int | None = process.exitcode
        return code

    def exit_code_of_a_fork(self, how: str) -> int:
        """The new process goes on with this very code, and ends with it."""
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if how == "exits":
            sys.exit(7)
        if how == "raises":
            raise ValueError("in the new process")
        return -1

    def signals_of_a_fork(self) -> list[Any]:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=tell_signals, args=(there,))
        process.start()
        told: list[Any] = here.recv()
        process.join(30)
        return told

    def signals_of_a_program(self) -> str:
        return subprocess.run(
            [sys.executable, "-c", _SIGNALS], check=True, capture_output=True, text=True
        ).stdout.strip()

    async def subprocess_of_the_loop(self) -> str:
        process = await asyncio.create_subprocess_exec("echo", "heard", stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        return out.decode().strip()

    def names(self) -> tuple[str, bool]:
        return multiprocessing.current_process().name, multiprocessing.current_process().daemon

    def leave_running(self) -> list[int]:
        """One child of multiprocessing, and one program."""
        child = multiprocessing.Process(target=time.sleep, args=(600,))
        child.start()
        assert child.pid is not None
        return [os.getpid(), child.pid, subprocess.Popen(["sleep", "600"]).pid]

    async def cancels_itself(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(60)

    def exits(self) -> None:
        sys.exit(3)


class CeleryUser:
    """Uses the project's own Celery app."""

    def __init__(self) -> None:
        self.made = multiply.delay(2, 3).get(timeout=5)

    def own(self) -> int:
        made: int = self.made + multiply.delay(2, 3).get(timeout=5)
        return made

    def shared(self) -> str:
        return str(add.app.main)

    async def shared_on_the_loop(self) -> str:
        return str(add.app.main)


class Leaver:
    """Registers things to be done at the end of its process."""

    def __init__(self, folder: str, hangs: bool = False) -> None:
        atexit.register(Path(folder, "atexit").write_text, "ran")
        if hangs:
            atexit.register(time.sleep, 600)
        thread = threading.Thread(target=self._work, args=(folder,))
        assert not thread.daemon
        thread.start()

    def _work(self, folder: str) -> None:
        with contextlib.suppress(TimeoutError):
            threading.main_thread().join(0.2)
        Path(folder, "thread").write_text("finished")

    def __call__(self) -> int:
        return os.getpid()


class Logs:
    """Writes everywhere, with logging set up in one of the usual ways."""

    def __init__(self, how: str) -> None:
        self.logger = logging.getLogger("shop.orders")
        if how == "basic":
            logging.basicConfig(format="MINE %(levelname)s %(message)s", level=logging.DEBUG, stream=sys.stdout)
        elif how == "without a level":
            logging.basicConfig(format="MINE %(levelname)s %(message)s")
        elif how == "ids":
            form = "%(qserve_deployment)s %(qserve_replica)s %(qserve_call_id)s %(message)s"
            logging.basicConfig(format=form, level=logging.INFO)
        elif how == "default":
            logging.basicConfig()
        elif how == "functions":
            self.logger = logging  # type: ignore[assignment]  # the functions of the module
        elif how == "dict":
            logging.config.dictConfig(
                {
                    "version": 1,
                    "formatters": {"own": {"format": "MINE %(name)s %(message)s"}},
                    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "own"}},
                    "loggers": {"shop": {"level": "INFO", "handlers": ["out"]}},
                }
            )
            self.logger = logging.getLogger("shop.orders2")  # made after: those before are switched off, as it says

    def write(self, mark: str) -> None:
        self.logger.debug("debug-%s", mark)
        self.logger.info("info-%s", mark)
        self.logger.warning("warning-%s", mark)
        print(f"print-{mark}")  # noqa: T201
        warnings.warn(f"for-developers-{mark}", DeprecationWarning, stacklevel=1)
        warnings.warn(f"warn-{mark}", UserWarning, stacklevel=1)

    def __call__(self, request: Request) -> None:
        raise ValueError(f"fail-{request.query_params['mark']}")
