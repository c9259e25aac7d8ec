"""Scripts that serve: what they show, how they end, and how a constructor that raises is told."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import runtime_folder
from tests.support.shell import Running, Shell, get

SCRIPT = """
    import sys
    from qserve import serve

    @serve.deployment
    class Greeter:
        def __init__(self, weights):
            print("loading")
            weights["greeting"]

        def __call__(self):
            print("called")
            return "hello"

    if __name__ == "__main__":
        weights = {"greeting": 1} if "good" in sys.argv else {}
        serve.run(Greeter.options(init_args=(weights,)), blocking="wait" not in sys.argv, http_options={"port": 0})
    """


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime)
        shell.write("script.py", SCRIPT)
        yield shell


class RunningScript(Running):
    """A script in the foreground of a shell that lets it ignore SIGINT, as shells do with background jobs."""

    def __init__(self, shell: Shell, *arguments: str) -> None:
        script = [sys.executable, str(shell.folder / "script.py"), *arguments]
        super().__init__(_Instead(shell, script), prefix=("sh", "-c", 'trap "" INT; exec "$@"', "sh"))


class _Instead(Shell):
    def __init__(self, shell: Shell, command: list[str]) -> None:
        super().__init__(shell.folder, shell.runtime)
        self._command = command

    def command(self, *_arguments: str) -> list[str]:
        return self._command


def test_a_script_that_stays_shows_what_qserve_run_shows_and_ends_by_sigint(shell: Shell) -> None:
    script = RunningScript(shell, "good")
    try:
        url = script.wait_for(r"^ +Greeter +curl (http\S+)$")[1]
        script.wait_for(r"^ +console +http://127\.0\.0\.1:\d+/-/console$")
        script.wait_for("^Ctrl-C stops it")
        assert get(url) == "hello"
        script.wait_for(r"^Greeter \| called$")
        assert "Greeter | loading" in script.lines
    finally:
        script.interrupt()
        assert script.end() == 0, script.output
    assert "Traceback" not in script.output
    assert " INFO " not in script.output
    assert list(shell.runtime.glob("**/*.json")) == []


def test_ctrl_c_while_it_starts_is_quiet(shell: Shell) -> None:
    script = RunningScript(shell, "good")
    script.wait_for(r"^Greeter \| loading$")
    script.interrupt(signal.SIGINT)
    assert script.end() in (0, 130), script.output
    assert "Traceback" not in script.output


@pytest.mark.parametrize("mode", ["wait", "stay"])
def test_a_constructor_that_raises_is_told_once_from_the_users_code_on(shell: Shell, mode: str) -> None:
    command = [sys.executable, "script.py", mode]
    done = subprocess.run(
        command, cwd=shell.folder, env=shell.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    said = done.stderr
    assert re.search(r"RuntimeError: Failed to reach deployment goal\..* Deployment 'Greeter':\nTraceback", said)
    assert said.count('weights["greeting"]') == 1
    assert said.count("KeyError: 'greeting'") <= 2  # with what a log says in a line
    assert f"{os.sep}qserve_workers{os.sep}" not in said


def test_a_script_that_goes_on_shows_what_its_replicas_print_to_the_end(shell: Shell) -> None:
    shell.write(
        "script.py",
        """
        from qserve import serve

        @serve.deployment
        class Greeter:
            def __call__(self, name):
                print("greeting", name)
                return f"hello {name}"

            def __del__(self):
                print("leaving")

        if __name__ == "__main__":
            handle = serve.run(Greeter.bind(), http_options={"port": 0})
            print(handle.remote("Ada").result(timeout_s=20))
        """,
    )
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command, cwd=shell.folder, env=shell.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "hello Ada\n"), done.stderr
    shown = [line for line in done.stderr.splitlines() if line.startswith("Greeter | ")]
    assert shown == ["Greeter | greeting Ada", "Greeter | leaving"]
