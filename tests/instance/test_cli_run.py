"""`qserve run` and `qserve start` with everything they start: what they show, how calls get through, how they end."""

import json
import signal
import subprocess
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qserve.settings import Settings
from tests.support.serving import free_port, runtime_folder
from tests.support.shell import Running, Shell, background, descendants, get
from tests.support.slowness import patience
from tests.support.waiting import wait_until

APP = """
    import os
    import time
    from qserve import serve

    @serve.deployment(num_replicas=2)
    class Counter:
        def __init__(self):
            self.count = 0

        def __call__(self):
            return "counter"

        def add(self, n: int = 1, *, times: int = 1):
            return n * times

        def fail(self):
            raise LookupError("nothing here")

        def rest(self, seconds):
            time.sleep(seconds)
            return "rested"

        def odd(self):
            return {3}

    @serve.deployment(route_prefix=None)
    def echo(value=None):
        return value
    """
BROKEN = """
    from qserve import serve

    @serve.deployment
    class Broken:
        def __init__(self):
            self.weights = {}["missing weights"]

        def __call__(self):
            return 1
    """


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Running]]:
    """`qserve run app`, and a shell beside it."""
    with runtime_folder() as runtime:
        shell = Shell(tmp_path_factory.mktemp("project"), runtime)
        shell.write("app.py", APP)
        with background(shell, "run", "app", "--port", "0") as running:
            running.wait_for("Ctrl-C stops it")
            yield shell, running


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with runtime_folder() as runtime:
        yield Shell(tmp_path, runtime)


# Beside a running instance


def test_run_prints_each_url_with_a_line_to_try(served: tuple[Shell, Running]) -> None:
    _, running = served
    command = running.wait_for(r"^ +Counter +(curl http://127.0.0.1:\d+/Counter)$")[1]
    assert subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout == "counter"
    assert running.wait_for(r"^ +echo +(qserve call echo)$")


def test_run_says_how_many_replicas_are_up(served: tuple[Shell, Running]) -> None:
    _, running = served
    assert running.wait_for("^Counter: 2 of 2 replicas are up$")
    assert running.wait_for("^echo: 1 of 1 replicas are up$")


def test_status_shows_replicas_with_pid_and_host(served: tuple[Shell, Running]) -> None:
    shell, running = served
    found = json.loads(shell.run("status", "--json").stdout)
    assert {row["name"]: (row["route"], row["state"]) for row in found["deployments"]} == {
        "Counter": ("/Counter", "HEALTHY"),
        "echo": (None, "HEALTHY"),
    }
    pids = {process.pid for process in descendants(running.process.pid)}
    replicas = [replica for row in found["deployments"] for replica in row["replicas"]]
    assert len(replicas) == 3
    assert {replica["pid"] for replica in replicas} <= pids
    table = shell.run("status").stdout
    for replica in replicas:
        assert f"pid {replica['pid']} on {replica['host']}" in table


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (("Counter",), '"counter"'),
        (("Counter", "add"), "1"),
        (("Counter", "add", "3", "times=2"), "6"),
        (("Counter", "odd"), "{3}"),
        (("echo", "word"), '"word"'),
        (("echo", '{"a": [1, null]}'), '{"a": [1, null]}'),
        (("echo", "-7"), "-7"),
    ],
)
def test_call_prints_the_result(served: tuple[Shell, Running], words: tuple[str, ...], printed: str) -> None:
    done = served[0].run("call", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed + "\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("Counter", "ad"), "Tried to call a method 'ad' that does not exist."),
        (("Counter", "fail"), "LookupError: nothing here"),
        (("Counter", "add", "1", "2"), "TypeError"),
        (("Conter",), "Did you mean 'Counter'?"),
        (("--timeout", "0.5", "Counter", "rest", "3"), "deadline"),
    ],
)
def test_call_fails_with_a_text(served: tuple[Shell, Running], words: tuple[str, ...], said: str) -> None:
    assert said in served[0].error("call", *words)


def test_status_is_watched_until_ctrl_c(served: tuple[Shell, Running]) -> None:
    shell, _ = served
    for arguments, shown in ((("--json",), '"name": "Counter"'), ((), "Counter .*HEALTHY")):
        with background(shell, "status", "--watch", *arguments) as watching:
            watching.wait_for(shown)
            watching.interrupt()
            assert watching.end() == 0, watching.output


def test_doctor_examines_the_running_instance(served: tuple[Shell, Running]) -> None:
    done = served[0].run("doctor")
    assert done.returncode == 0
    assert "ok    eviction" in done.stdout


def test_a_second_instance_of_the_same_name_is_refused(served: tuple[Shell, Running]) -> None:
    shell, _ = served
    said = shell.error("run", "app", "--port", "0")
    assert "An instance runs on this machine already" in said
    assert "qserve deploy" in said


def test_deploy_and_delete_reach_the_running_instance(served: tuple[Shell, Running]) -> None:
    shell, running = served
    shell.write("more.py", APP.replace("Counter", "More").replace("echo", "more_echo"))
    base = running.wait_for(r"(http://127.0.0.1:\d+)/Counter")[1]
    done = shell.run("deploy", "more:More", "--replicas", "1")
    assert done.returncode == 0, done.stderr
    assert get(f"{base}/More") == "counter"
    assert shell.run("delete", "More").returncode == 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{base}/More")


def test_a_constructor_that_raises_fails_the_deploy_with_the_users_traceback(served: tuple[Shell, Running]) -> None:
    shell, _ = served
    shell.write("broken.py", BROKEN)
    said = shell.error("deploy", "broken")
    assert "Deployment 'Broken'" in said
    assert "KeyError: 'missing weights'" in said
    assert f'{shell.folder}/broken.py", line' in said
    assert "Broken" not in shell.run("status").stdout


# Life and end


def test_ctrl_c_stops_every_process_and_is_no_failure(shell: Shell) -> None:
    shell.write("app.py", APP)
    with background(shell, "run", "app", "--port", "0") as running:
        running.wait_for("Ctrl-C stops it")
        started = descendants(running.process.pid)
        assert len(started) >= 6  # node, Valkey, gateway, two workers, three replicas
        running.interrupt()
        assert running.end() == 0, running.output
        assert psutil.wait_procs(started, timeout=patience(5))[1] == []
        assert list(shell.runtime.glob("*.json")) == []
        assert "Traceback" not in running.output, running.output


def test_ctrl_c_lets_calls_finish_and_a_second_one_does_not(shell: Shell) -> None:
    shell.write("app.py", APP)
    with background(shell, "run", "app:Counter", "--port", "0") as running:
        running.wait_for("Ctrl-C stops it")
        started = descendants(running.process.pid)
        calling = subprocess.Popen(
            shell.command("call", "Counter", "rest", "60"),
            cwd=shell.folder,
            env=shell.environment,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: json.loads(shell.run("status", "--json").stdout)["deployments"][0]["running"] == 1)
        running.interrupt()
        running.wait_for("Stopping")
        assert running.process.poll() is None
        running.interrupt()
        assert running.end(10) == 130
        assert psutil.wait_procs(started, timeout=patience(5))[1] == []
        calling.kill()
        calling.wait()


@pytest.mark.parametrize("command", [("run", "app:echo", "--port", "0"), ("start", "--gateway", "--port", "0")])
def test_sigint_ends_it_though_the_shell_ignores_it(command: tuple[str, ...], shell: Shell, settings: Settings) -> None:
    """As in a script of a shell, whose background jobs ignore SIGINT."""
    shell.write("app.py", APP)
    if command[0] == "start":
        shell.extra = {"QSERVE_REDIS_URL": settings.redis_url, "QSERVE_SECRET": settings.secret}
    ignoring = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    with background(shell, *command, prefix=ignoring) as running:
        running.wait_for("Ctrl-C stops it|serving on")
        running.interrupt()
        assert running.end() == 0, running.output


def test_sigterm_ends_it_like_ctrl_c(shell: Shell) -> None:
    shell.write("app.py", APP)
    with background(shell, "run", "app:echo", "--port", "0") as running:
        running.wait_for("Ctrl-C stops it")
        started = descendants(running.process.pid)
        running.interrupt(signal.SIGTERM)
        assert running.end() == 0, running.output
        assert psutil.wait_procs(started, timeout=patience(5))[1] == []


def test_a_killed_run_leaves_nothing_behind(shell: Shell) -> None:
    shell.write("app.py", APP)
    with background(shell, "run", "app:echo", "--port", "0") as running:
        running.wait_for("Ctrl-C stops it")
        started = descendants(running.process.pid)
        running.interrupt(signal.SIGKILL)
        running.end()
        assert psutil.wait_procs(started, timeout=patience(20))[1] == []


def test_an_application_that_cannot_start_ends_the_run(shell: Shell) -> None:
    shell.write("broken.py", BROKEN)
    said = shell.error("run", "broken", "--port", "0")
    assert "KeyError: 'missing weights'" in said
    assert list(shell.runtime.glob("*.json")) == []


def test_shutdown_ends_a_run_from_another_shell(shell: Shell) -> None:
    shell.write("app.py", APP)
    with background(shell, "run", "app:echo", "--port", "0") as running:
        running.wait_for("Ctrl-C stops it")
        done = shell.run("shutdown")
        assert done.returncode == 0
        assert "Stopped the instance on this machine" in done.stderr
        assert running.end(10) == 1, running.output
    assert "Somebody ran `qserve shutdown`" in running.output


def test_replicas_and_debug_are_handed_on(shell: Shell) -> None:
    shell.write("app.py", APP.replace('return "counter"', "return 1 / 0"))
    with background(shell, "run", "app:Counter", "--port", "0", "--replicas", "1", "--debug") as running:
        running.wait_for("Ctrl-C stops it")
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(running.wait_for(r"curl (http\S+)")[1])
        body = caught.value.read().decode()
        assert len(json.loads(shell.run("status", "--json").stdout)["deployments"][0]["replicas"]) == 1
    assert "ZeroDivisionError" in body
    assert "return 1 / 0" in body


def test_reload_serves_an_edited_helper_and_survives_a_syntax_error(shell: Shell) -> None:
    shell.write("words.py", "WORD = 'first'")
    shell.write(
        "app.py",
        """
        from qserve import serve
        from words import WORD

        @serve.deployment
        def say():
            return WORD
        """,
    )
    with background(shell, "run", "app", "--port", "0", "--reload") as running:
        running.wait_for("Ctrl-C stops it")
        url = running.wait_for(r"curl (http\S+)")[1]
        assert get(url) == "first"
        shell.write("words.py", "WORD = (")
        running.wait_for("words.py changed: deploying again")
        running.wait_for("was never closed")
        assert get(url) == "first"
        shell.write("words.py", "WORD = 'second'")
        running.wait_for("say: serving, version")
        assert get(url) == "second"


# A node of an instance elsewhere


def test_start_serves_what_is_deployed_and_leaves_on_sigterm(shell: Shell, settings: Settings) -> None:
    shell.extra = {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_NAMESPACE": settings.namespace,
        "QSERVE_SECRET": settings.secret,
    }
    shell.write("app.py", APP)
    assert shell.run("deploy", "app").returncode == 0
    port = free_port()
    with background(shell, "start", "--only", "Counter", "--gateway", "--port", str(port)) as node:
        node.wait_for(r"Deployment Counter, generation 1: HEALTHY|replica Counter#\w+ .*SERVING")
        wait_until(lambda: shell.run("call", "--timeout", "5", "Counter").stdout == '"counter"\n')
        found = json.loads(shell.run("status", "--json").stdout)
        assert [len(row["replicas"]) for row in found["deployments"]] == [1, 0]
        assert get(f"http://127.0.0.1:{port}/Counter") == "counter"
        node.interrupt(signal.SIGTERM)
        assert node.end() == 0, node.output
    assert json.loads(shell.run("status", "--json").stdout)["nodes"] == []


def test_run_on_a_server_of_its_own_choice(shell: Shell, settings: Settings) -> None:
    shell.extra = {"QSERVE_NAMESPACE": settings.namespace, "QSERVE_SECRET": settings.secret}
    shell.write("app.py", APP)
    with background(shell, "run", "app:echo", "--port", "0", "--redis-url", settings.redis_url) as running:
        running.wait_for("Ctrl-C stops it")
        done = shell.run("call", "echo", "hi", "--redis-url", settings.redis_url)
        assert done.stdout == '"hi"\n', done
        assert settings.redis_url not in " ".join(psutil.Process(running.process.pid).children()[0].cmdline())
