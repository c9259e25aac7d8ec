"""The `qserve` command as a user runs it: real processes, in a project folder and runtime folder of their own."""

import re
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.serving import environment
from tests.support.slowness import patience
from tests.support.waiting import joined


@dataclass
class Shell:
    """A user's shell in a project folder; nothing else on the machine is seen."""

    folder: Path
    runtime: Path
    extra: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return path

    def run(self, *arguments: str, timeout: float = 40) -> subprocess.CompletedProcess[str]:
        """Run `qserve` to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=patience(timeout),
            check=False,
        )

    def error(self, *arguments: str) -> str:
        """What a command says that has to fail with exit code 1 and one readable text."""
        done = self.run(*arguments)
        assert done.returncode == 1, done
        _, *texts = re.split(r"^Error: ", done.stderr, flags=re.MULTILINE)
        assert len(texts) == 1, done.stderr
        text: str = texts[0]
        assert not re.search(r"qserve(_workers)?/\w+\.py", text), text
        return text

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "qserve.cli", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.runtime) | self.extra


class Running:
    """A `qserve run` or `qserve start` in the foreground of a shell, with its output line by line."""

    def __init__(self, shell: Shell, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            [*prefix, *shell.command(*arguments)],
            cwd=shell.folder,
            env=shell.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                with self._more:
                    self.lines.append(line.rstrip())
                    self._more.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """Until a line matches."""

        def look() -> re.Match[str] | None:
            return next((found for line in list(self.lines) if (found := re.search(pattern, line))), None)

        with self._more:
            assert self._more.wait_for(lambda: look() or not self._reader.is_alive(), patience(timeout)), self.output
        found = look()
        assert found, self.output
        return found

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def end(self, timeout: float = 40) -> int:
        """Its exit code, once it has ended."""
        code = self.process.wait(patience(timeout))
        joined(self._reader, limit_s=5)
        return code


@contextmanager
def background(shell: Shell, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[Running]:
    started = Running(shell, *arguments, prefix=prefix)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.interrupt()
        try:
            started.end()
        except subprocess.TimeoutExpired:
            started.process.kill()
            raise


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=patience(20)) as response:
        text: str = response.read().decode()
    return text


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def elsewhere(code: str) -> str:
    """What another process of the same user prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"from qserve import serve\n{code}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=patience(40),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
