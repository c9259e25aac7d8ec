"""What somebody sees who runs `qserve run` in a terminal, from the first line to Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.serving import runtime_folder
from tests.support.shell import Shell, get
from tests.support.slowness import patience
from tests.support.waiting import wait_until

APP = """
    import time
    from fastapi import FastAPI
    from qserve import serve

    @serve.deployment(route_prefix="/greet", num_replicas=2)
    class Greeter:
        def __init__(self):
            print("loading")
            time.sleep(1)

        def __call__(self, request):
            print("greeting")
            return "Hello " + request.query_params["name"]

    @serve.deployment(route_prefix="/fail")
    def fail():
        raise LookupError("nothing here")

    @serve.deployment(route_prefix=None)
    def add(a: int, b: int = 2):
        return a + b

    @serve.deployment(route_prefix="/api")
    @serve.ingress(FastAPI())
    class Api: ...
    """


class Session:
    """A terminal with a command in it, and all that it has shown."""

    def __init__(self, shell: Shell, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = shell.environment | {"TERM": "xterm-256color", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            shell.command(*arguments), cwd=shell.folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.raw = ""

    @property
    def text(self) -> str:
        """What it has shown, without colours; a line that was written over counts as lines."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw).replace("\r", "\n")

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    def wait_for(self, pattern: str) -> re.Match[str]:
        def look() -> re.Match[str] | None:
            self._read(1)
            return re.search(pattern, self.text, re.MULTILINE)

        return wait_until(look, shows=lambda: self.text)

    def end(self) -> int:
        """Its exit code, once it has ended."""

        def has_ended() -> bool:
            self._read(0.1)
            return self.process.poll() is not None

        wait_until(has_ended, 40, shows=lambda: self.text)
        return self.process.wait(patience(5))

    def _read(self, timeout_s: float) -> None:
        try:
            if select.select([self._ours], [], [], timeout_s)[0]:
                self.raw += os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # nobody has the terminal any more
            pass

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(patience(20))
        os.close(self._ours)


@contextmanager
def session(folder: Path, app: str, *arguments: str) -> Iterator[Session]:
    with runtime_folder() as runtime:
        shell = Shell(folder, runtime)
        shell.write("app.py", app)
        running = Session(shell, *arguments)
        try:
            yield running
        finally:
            running.close()


def test_a_session_from_the_first_line_to_ctrl_c(tmp_path: Path) -> None:
    with session(tmp_path, APP, "run", "--port", "0") as terminal:
        terminal.wait_for(r"[01] of \d replicas are up, \d+ s; waiting for .*Greeter")
        terminal.wait_for("^Ctrl-C stops it")
        introduction = terminal.lines[next(i for i, line in enumerate(terminal.lines) if " serves " in line) :]
        assert len(introduction) <= 12
        commands = {name: terminal.wait_for(rf"^ +{name} +(.+?)\s*$")[1] for name in ("Greeter", "fail", "Api", "add")}
        assert commands["add"] == "qserve call add 1"
        assert commands["Api"].endswith("/api/docs")
        url = commands["Greeter"].removeprefix("curl ").strip("'")
        assert get(url) == "Hello Ada"
        terminal.wait_for(r"^\d\d:\d\d:\d\d 200 GET /greet\?name=Ada \d+\.\d ms Greeter\s*$")
        terminal.wait_for(r"^Greeter \| greeting\s*$")
        subprocess.run(commands["fail"].split(), capture_output=True, check=True)
        terminal.wait_for(r"^LookupError: nothing here")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0
        assert "Greeter | loading" in terminal.text
        assert " INFO " not in terminal.text
        assert "qserve_workers" not in terminal.text
        assert terminal.text.count("runs as root") == (os.geteuid() == 0)
        assert "\x1b[" in terminal.raw


def test_ctrl_c_while_the_application_is_imported_is_quiet(tmp_path: Path) -> None:
    with session(tmp_path, "import time\nprint('importing', flush=True)\ntime.sleep(60)", "run") as terminal:
        terminal.wait_for("^importing")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        assert "Traceback" not in terminal.text
