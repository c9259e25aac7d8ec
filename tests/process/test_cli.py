"""What `qserve` makes of its command line, and what it says where it cannot do what is asked."""

import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import redis
from click.testing import CliRunner
from rich.console import Console

from qserve.broker.instance.state import State
from qserve.broker.server import embedded
from qserve.cli.application import did_you_mean
from qserve.cli.call import parse_call, show, unknown_deployment
from qserve.cli.command_line import COMMANDS, main
from qserve.cli.project.source import Watcher, content_version
from qserve.cli.status import InstanceStatus, ReplicaStatus, render
from qserve.settings import Settings
from qserve.tracebacks import users_part
from qserve.user_code.source_files import project_files
from qserve.wire.spec import DeploymentSpec, Target
from tests.support.faulty_link import FaultyLink
from tests.support.serving import free_port, runtime_folder
from tests.support.shell import Shell, background
from tests.support.waiting import wait_until


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with runtime_folder() as runtime:
        yield Shell(tmp_path, runtime)


@pytest.fixture
def shared(shell: Shell, settings: Settings) -> Shell:
    """A shell whose instance is the one of the test's Redis, without any node."""
    shell.extra = {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_NAMESPACE": settings.namespace,
        "QSERVE_SECRET": settings.secret,
    }
    return shell


# The words of a command line


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ((), ("", [], {})),
        (("add",), ("add", [], {})),
        (("add", "1", "times=2"), ("add", [1], {"times": 2})),
        (("3",), ("", [3], {})),
        (("-1.5",), ("", [-1.5], {})),
        (("__call__", "word"), ("", ["word"], {})),
        (("two words",), ("", ["two words"], {})),
        (('"quoted"',), ("", ["quoted"], {})),
        (("true", "null"), ("", [True, None], {})),
        (('{"a": [1]}',), ("", [{"a": [1]}], {})),
        (("say", "{broken"), ("say", ["{broken"], {})),
        (("say", "name=Ada Lovelace"), ("say", [], {"name": "Ada Lovelace"})),
        (("say", "a b=c", '"k=v"'), ("say", ["a b=c", "k=v"], {})),
        (("say", "url=http://x/?q=1"), ("say", [], {"url": "http://x/?q=1"})),
    ],
)
def test_words_become_a_call(words: tuple[str, ...], call: tuple[str, list[object], dict[str, object]]) -> None:
    assert parse_call(words, may_have_method=True) == call


def test_a_function_has_no_methods_so_its_first_word_is_an_argument() -> None:
    assert parse_call(("word",), may_have_method=False) == ("", ["word"], {})


def test_an_argument_after_a_keyword_is_a_usage_error() -> None:
    with pytest.raises(click.UsageError, match="stands after a KEY=VALUE"):
        parse_call(("say", "a=1", "2"), may_have_method=True)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("häh", '"häh"'),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (b"raw", "b'raw'"),
        ({3}, "{3}"),
        (1.5, "1.5"),
        ("\udce9", r'"\udce9"'),
    ],
)
def test_results_are_json_where_they_can_be(result: object, text: str) -> None:
    assert show(result) == text


REMOTE_TRACEBACK = """\
Traceback (most recent call last):
  File "/site-packages/qserve_workers/user/user_entry.py", line 86, in _run
    result = await loop.run_in_executor(
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/lib/python3.11/concurrent/futures/thread.py", line 58, in run
    result = self.fn(*self.args)
{frames}KeyError: 'weights'
"""
USERS_FRAME = """\
  File "/home/me/qserve/app.py", line 7, in load
    return {}["weights"]
           ~~^^^^^^^^^^^
"""


def test_a_remote_traceback_begins_with_the_users_frame() -> None:
    said = users_part("It failed.\n" + REMOTE_TRACEBACK.format(frames=USERS_FRAME))
    assert said == f"It failed.\nTraceback (most recent call last):\n{USERS_FRAME}KeyError: 'weights'"


def test_a_remote_traceback_without_any_frame_of_the_user_is_its_last_line() -> None:
    assert users_part(REMOTE_TRACEBACK.format(frames="")) == "KeyError: 'weights'"


def test_an_unknown_deployment_is_told_with_what_there_is() -> None:
    assert unknown_deployment("Conter", ["Counter", "Echo"]).endswith("Did you mean 'Counter'?")
    assert unknown_deployment("x", ["Counter", "Echo"]).endswith("Deployed: Counter, Echo.")
    assert unknown_deployment("x", []).endswith("Deployed: nothing.")


def test_help_says_what_each_command_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The overview stands apart from the commands, so that `--help` need not import them."""
    overview = CliRunner().invoke(main, ["--help"])
    assert overview.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in overview.output
        page = CliRunner().invoke(main, [name, "--help"])
        assert page.exit_code == 0
        assert page.output.startswith("Usage:")


# The files of an application


def spec_of(**changes: object) -> DeploymentSpec:
    return DeploymentSpec(name="D", target=Target("m:D", sys_path=("/a",)), revision="r1", **changes)  # type: ignore[arg-type]


def test_the_version_changes_with_code_and_constructor_arguments_only(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text("x = 1")
    version = content_version(spec_of(), tmp_path, [source])
    assert content_version(spec_of(num_replicas=3, user_config=b"1", route_prefix="/x"), tmp_path, [source]) == version
    assert content_version(spec_of(init_args=b"1"), tmp_path, [source]) != version
    assert content_version(spec_of(max_concurrent_queries=7), tmp_path, [source]) != version
    source.write_text("x = 2")
    assert content_version(spec_of(), tmp_path, [source]) != version


def test_the_version_does_not_depend_on_where_the_checkout_stands(tmp_path: Path) -> None:
    versions = set()
    for name in ("a", "b"):
        source = tmp_path / name / "m.py"
        source.parent.mkdir()
        source.write_text("x = 1")
        spec = DeploymentSpec(name="D", target=Target("m:D", sys_path=(str(source.parent),)), revision=name)
        versions.add(content_version(spec, source.parent, [source]))
    assert len(versions) == 1


def test_project_files_are_the_imported_ones_below_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shop_of_test"
    package.mkdir()
    for name in ("__init__", "cart", "unused"):
        (package / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("shop_of_test.cart")
    assert [path.name for path in project_files(tmp_path)] == ["__init__.py", "cart.py"]
    assert click.__file__ not in map(str, project_files(tmp_path))
    assert [path.name for path in project_files(tmp_path / "elsewhere", ["shop_of_test.cart"])] == ["cart.py"]


def test_the_watcher_tells_an_edit_once_and_survives_files_that_are_replaced(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("1")
    two.write_text("2")
    watcher = Watcher([one, two])
    assert watcher.changed() == []
    one.unlink()
    assert watcher.changed() == []
    one.write_text("changed")
    assert watcher.changed() == [one]
    assert watcher.changed() == []
    two.write_text("also changed")
    watcher.watch([two])  # an edit made while the application was imported again is not lost
    assert watcher.changed() == [two]


def test_close_names_are_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weather_app.py").write_text("Forecast = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert did_you_mean("wether_app:Forecast") == " Did you mean 'weather_app:Forecast'?"
    assert did_you_mean("completely.different") == ""
    __import__("weather_app")
    assert did_you_mean("weather_app:Forcast") == " Did you mean 'weather_app:Forecast'?"
    assert did_you_mean("weather_app:Forecast") == ""


# Status


def test_the_table_shows_what_somebody_on_call_looks_for() -> None:
    found: InstanceStatus = {
        "namespace": "default",
        "large_values": {"lent": 1200, "passed_on": 3, "sent": 0, "stored": 0},
        "gateways": [{"id": "g", "host": "web1", "pid": 5, "url": "http://web1:8000", "drained": False}],
        "nodes": [{"id": "n", "host": "gpu1", "pid": 6, "url": "", "drained": False}],
        "deployments": [
            {
                "name": "Model",
                "route": "/model",
                "state": "DEPLOY_FAILED",
                "error": "no such file: weights",
                "paused": True,
                "paused_since": 1_700_000_000.0,
                "paused_by": "ada@gpu1",
                "version": "2",
                "generation": 3,
                "queued": 17,
                "running": 2,
                "p50_ms": 12.34,
                "p99_ms": 1234.0,
                "replicas": [replica("gpu1", 71, "SERVING"), replica("gpu2", 72, "STARTING")],
                "wanted": 3,
                "asleep": False,
                "autoscaling_config": {"min_replicas": 1, "max_replicas": 5},
            }
        ],
    }
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render(found))
    text = capture.get()
    shown = (
        "http://web1:8000",
        "Large values: 1,200 lent, 3 passed on, 0 sent, 0 stored",
        "gpu1 (pid 6)",
        "/model",
        "DEPLOY_FAILED",
        "by ada@gpu1",
        "pid 71 on gpu1",
        "17",
        "12.3 ms",
        "1.23 s",
    )
    for part in shown:
        assert part in text
    assert "pid 72 on gpu2, GPU 0 (0.5) (starting)" in text
    assert "3 wanted, of 1 to 5" in text
    assert "Model: no such file: weights" in text


def replica(host: str, pid: int, state: str) -> ReplicaStatus:
    return {
        "tag": f"Model#{pid}",
        "host": host,
        "pid": pid,
        "node": "n",
        "state": state,
        "generation": 3,
        "running": 1,
        "handled": 5,
        "p50_ms": None,
        "p99_ms": None,
        "problem": "check_health has failed" if state == "UNHEALTHY" else "",
        "gpus": "0 (0.5)" if host == "gpu2" else "",
    }


# Bad input


COUNTER = """
    from qserve import serve

    @serve.deployment
    class Counter:
        def __call__(self):
            return 1
    """


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("conter", "Could not import module 'conter': no module named 'conter'. Did you mean 'counter'?"),
        ("counter:Conter", "Attribute 'Conter' not found in module 'counter'. Did you mean 'counter:Counter'?"),
        ("counter:", 'must be in format "<module>" or "<module>:<name>"'),
        ("conter.py", "There is no Python file 'conter.py'."),
        ("./counter.py:Conter", "Attribute 'Conter' not found in module 'counter'."),
        ("json", "There is nothing to deploy in 'json'"),
    ],
)
def test_an_application_that_is_not_there_is_told_in_a_sentence(shell: Shell, app: str, said: str) -> None:
    shell.write("counter.py", COUNTER)
    assert said in shell.error("run", app)


def test_an_application_that_raises_is_shown_with_the_users_frames_only(shell: Shell) -> None:
    shell.write("settings_of_app.py", "limit = int('many')")
    shell.write("app.py", "import settings_of_app")
    said = shell.error("run", "app")
    assert [line for line in said.splitlines() if line.startswith("  File")] == [
        f'  File "{shell.folder}/app.py", line 1, in <module>',
        f'  File "{shell.folder}/settings_of_app.py", line 1, in <module>',
    ]
    assert said.rstrip().endswith("ValueError: invalid literal for int() with base 10: 'many'")


def test_a_missing_import_of_the_application_is_not_taken_for_a_missing_application(shell: Shell) -> None:
    shell.write("app.py", "import surely_not_installed")
    said = shell.error("run", "app")
    assert "No module named 'surely_not_installed'" in said
    assert f'"{shell.folder}/app.py", line 1' in said


def test_a_taken_port_is_told_before_anything_starts(shell: Shell) -> None:
    shell.write("counter.py", COUNTER)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = shell.error("run", "counter", "--port", str(port))
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in said
    assert "--port" in said


def test_an_address_of_another_machine_is_told(shell: Shell) -> None:
    shell.write("counter.py", COUNTER)
    assert "Cannot listen on 192.0.2.1" in shell.error("run", "counter", "--host", "192.0.2.1", "--port", "0")


@pytest.mark.parametrize(
    "command", [("status",), ("call", "X"), ("delete", "X"), ("shutdown",), ("start",), ("doctor",)]
)
def test_without_an_instance_commands_say_how_to_start_one(shell: Shell, command: tuple[str, ...]) -> None:
    said = shell.error(*command)
    assert "There is no instance running" in said
    assert "QSERVE_REDIS_URL" in said


@pytest.mark.parametrize("command", [("status",), ("call", "X"), ("run", "counter"), ("deploy", "counter")])
def test_an_unreachable_server_is_named(shell: Shell, command: tuple[str, ...]) -> None:
    shell.write("counter.py", COUNTER)
    port = free_port()
    waits = ("--timeout", "0.5") if command[0] == "deploy" else ()
    said = shell.error(*command, *waits, "--redis-url", f"redis://127.0.0.1:{port}")
    assert f"Redis cannot be reached at 127.0.0.1:{port}" in said


def test_a_node_waits_for_a_server_that_cannot_be_reached(shared: Shell, settings: Settings, state: State) -> None:
    with FaultyLink(settings.redis_url) as line:
        line.part()
        with background(shared, "start", "--no-gateway", "--redis-url", line.url) as node:
            node.wait_for("Redis cannot be reached at .* Trying again until it answers")
            assert shared.run("healthy").returncode == 0
            line.heal()
            wait_until(lambda: [info.pid for info in state.observed.nodes().values()] == [node.process.pid])


def test_a_node_that_waits_for_a_server_ends_when_it_is_told_to(shell: Shell) -> None:
    with background(shell, "start", "--no-gateway", "--redis-url", f"redis://127.0.0.1:{free_port()}") as node:
        node.wait_for("Redis cannot be reached at .* Trying again until it answers")
        node.interrupt(signal.SIGTERM)
        assert node.end() == 0


def test_an_evicting_server_is_refused(shell: Shell, redis_server: str, redis_client: "redis.Redis") -> None:
    shell.write("counter.py", COUNTER)
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        for command in (("run", "counter"), ("deploy", "counter"), ("start",), ("status",)):
            said = shell.error(*command, "--redis-url", redis_server)
            assert "maxmemory-policy is allkeys-lru" in said
            assert "noeviction" in said
        examined = shell.run("doctor", "--redis-url", redis_server)
        assert examined.returncode == 1
        assert "FAIL  eviction" in examined.stdout
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")


def test_a_wrong_password_ends_deploy_at_once(shell: Shell, redis_server: str, redis_client: "redis.Redis") -> None:
    shell.write("counter.py", COUNTER)
    url = redis_server.replace("://", "://nobody:guess@")
    said = shell.error("deploy", "counter", "--redis-url", url)
    assert "does not accept the user name and password" in said
    assert "guess" not in said


def test_an_old_server_is_refused(shell: Shell) -> None:
    shell.write("counter.py", COUNTER)
    with old_redis() as url:
        assert "Redis 6.2.14 is too old" in shell.error("run", "counter", "--redis-url", url)


def test_what_is_not_a_redis_url_is_told(shell: Shell) -> None:
    assert "is not a Redis URL" in shell.error("status", "--redis-url", "http://localhost")


def test_code_that_cannot_be_imported_needs_a_key(shared: Shell) -> None:
    shared.write(
        "app.py",
        """
        from qserve import serve

        def make():
            @serve.deployment
            class Inner:
                def __call__(self):
                    return 1
            return Inner

        apps = [make()]
        """,
    )
    key, shared.extra["QSERVE_SECRET"] = shared.extra["QSERVE_SECRET"], ""
    said = shared.error("deploy", "app:apps")
    assert "Inner" in said
    assert "QSERVE_SECRET" in said
    shared.extra["QSERVE_SECRET"] = key
    assert shared.run("deploy", "app:apps").returncode == 0


@pytest.mark.parametrize(
    "arguments", [("run", "app", "--port", "70000"), ("stats",), ("call",), ("deploy", "app", "--nope")]
)
def test_usage_errors_have_exit_code_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    done = shell.run(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stderr


# Deploying where no node is, as a one-shot service does


def test_deploying_again_changes_nothing_until_the_code_does(shared: Shell, state: State) -> None:
    shared.write("counter.py", COUNTER)
    generations = []
    for text in (COUNTER, COUNTER, COUNTER.replace("return 1", "return 2")):
        shared.write("counter.py", text)
        done = shared.run("deploy", "counter")
        assert done.returncode == 0, done.stderr
        assert "Counter: waits for a node" in done.stderr
        generations.append(state.generation("Counter"))
    assert generations == [1, 1, 2]


def test_deploy_waits_for_a_server_that_is_still_starting(shell: Shell) -> None:
    shell.write("counter.py", COUNTER)
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    with background(shell, "deploy", "counter", "--redis-url", url) as deploying:
        deploying.wait_for("Waiting up to 60 s")
        with server_on(port, shell.runtime):
            assert deploying.end() == 0, deploying.output
    assert "Counter: waits for a node" in deploying.output


def test_deploy_takes_the_application_from_the_environment(shared: Shell, state: State) -> None:
    shared.write("counter.py", COUNTER)
    shared.extra["QSERVE_APP"] = "counter:Counter"
    assert shared.run("deploy", "--replicas", "3").returncode == 0
    deployed = state.get("Counter")
    assert deployed is not None
    assert deployed.spec.num_replicas == 3


def test_a_route_that_is_taken_is_told(shared: Shell) -> None:
    shared.write("one.py", COUNTER)
    shared.write(
        "two.py", COUNTER.replace("serve.deployment", "serve.deployment(name='Other', route_prefix='/Counter')")
    )
    assert shared.run("deploy", "one").returncode == 0
    assert "Deployment 'Other': route_prefix '/Counter' is already registered." in shared.error("deploy", "two")


def test_a_key_of_another_instance_is_told(shared: Shell) -> None:
    shared.write("counter.py", COUNTER)
    assert shared.run("deploy", "counter").returncode == 0
    shared.extra["QSERVE_SECRET"] = "another"
    for command in (("status",), ("deploy", "counter")):
        assert "Set QSERVE_SECRET to the key of the instance" in shared.error(*command)


def test_status_delete_and_shutdown_work_without_any_node(shared: Shell) -> None:
    shared.write("counter.py", COUNTER)
    assert "Nothing is deployed" in shared.run("status").stdout
    assert shared.run("deploy", "counter").returncode == 0
    table = shared.run("status").stdout
    assert "no node: nothing can run" in table
    assert "WAITING" in table
    found = json.loads(shared.run("status", "Counter", "--json").stdout)
    assert [(row["name"], row["route"], row["state"]) for row in found["deployments"]] == [
        ("Counter", "/Counter", "WAITING")
    ]
    assert "Did you mean 'Counter'?" in shared.error("delete", "Conter")
    assert shared.run("delete", "Counter").returncode == 0
    assert shared.run("deploy", "counter").returncode == 0
    assert shared.run("shutdown").returncode == 0
    assert "There is no deployment 'Countr'" in shared.error("status", "Countr")
    assert json.loads(shared.run("status", "--json").stdout)["deployments"] == []


def test_doctor_prints_a_line_for_each_check(shared: Shell) -> None:
    done = shared.run("doctor")
    assert done.returncode == 0, done
    assert re.search(r"^ok +reachable +Valkey", done.stdout, re.MULTILINE)
    assert re.search(r"^warn +persistence .*\n +-> CONFIG SET appendonly yes", done.stdout, re.MULTILINE)


@contextmanager
def old_redis() -> Iterator[str]:
    """Something that answers like a Redis 6."""

    class Answers(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while header := self.rfile.readline():
                words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2] for _ in range(int(header[1:]))]
                info = b"redis_version:6.2.14\r\nrole:master\r\nmaxmemory_policy:noeviction\r\n"
                answers = {b"INFO": b"$%d\r\n%b\r\n" % (len(info), info), b"TIME": b"*2\r\n:1\r\n:1\r\n"}
                self.wfile.write(answers.get(words[0].upper(), b"-ERR unknown command\r\n"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def server_on(port: int, folder: Path) -> Iterator[None]:
    """A real server on a TCP port."""
    command = [str(embedded.find_server()), "--port", str(port), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield
    server.kill()
    server.wait()


def test_help_imports_nothing_heavy() -> None:
    """Then `qserve --help` answers in well under 0.3 s."""
    heavy = ["redis", "pydantic", "rich", "starlette", "msgspec", "cloudpickle"]
    code = f"import sys, qserve.cli.command_line; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_ctrl_c_is_quiet_while_the_command_is_imported() -> None:
    code = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "qserve.cli.command_line":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from qserve.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
