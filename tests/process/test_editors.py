"""What editors and type checkers know of options: their names, their types, and where a mistake is.

mypy, and basedpyright, which is Pyright as an editor runs it and comes with all that it needs.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from mypy import api

from qserve.calls.handles.call_options import Changes, DurableTerms
from qserve.wire.options import GivenOptions
from tests.support.serving import ROOT

PROGRAM = """
from qserve import serve
from qserve.tasks import TaskProcessorConfig, task_consumer, task_handler


@serve.deployment(num_replicas="auto", max_ongoing_requests=5, num_gpus=0.5, route_prefix=None)
class Counter:
    def add(self, amount: int) -> int:
        return amount


@serve.deployment
async def double(number: int) -> str:
    return str(number)


@serve.deployment
@task_consumer(task_processor_config=TaskProcessorConfig(queue_name="q"))
class Consumer:
    @task_handler(name="x")
    def work(self, number: int) -> int:
        return number


Counter.options(name="other", user_config={"a": 1}, timeout_s=3)
handle = double.get_handle()
reveal_type(handle.remote(3))
reveal_type(handle.options(stream=True, multiplexed_model_id="a"))
reveal_type(handle.options(durable=True, retries=3, delay=1.5, retry_on=ValueError, priority="batch"))
reveal_type(handle.options(timeout_s=3).remote(4))
reveal_type(handle.options(stream=True).options(method_name="x", timeout_s=3))
reveal_type(handle.options(durable=True).options(retries=3, delay=1.5))
reveal_type(double.get_handle(sync=False).options(durable=True).options(priority="batch"))

serve.deployment(num_replica=2)  # wrong
serve.deployment(num_replicas="two")  # wrong
serve.deployment(num_gpus="1")  # wrong
Counter.options(nmae="x")  # wrong
Counter.options(timeout_s="x")  # wrong
handle.remote("x")  # wrong
handle.options(timeout=3)  # wrong
handle.options(timeout_s="3")  # wrong
handle.options(durable=True, retry=3)  # wrong
handle.options(durable=True, priority="urgent")  # wrong
handle.options(delay=1)  # wrong
handle.options(stream=True).options(timeout_s="3")  # wrong
handle.options(durable=True).options(retry=3)  # wrong
task_handler(name=3)  # wrong


class Bare:
    def __init__(self, part: serve.DeploymentHandle, application: serve.Application, other: serve.Deployment) -> None:
        self.response: serve.DeploymentResponse = part.method.remote(1)
        self.stream: serve.DeploymentResponseGenerator = part.options(stream=True).remote(1)
        self.ref: serve.DurableRef = part.options(durable=True).remote(1)
"""
WRONG = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}
REVEALED = [
    *("Ref[str]", "StreamHandle", "DurableHandle", "Ref[str]"),
    *("StreamHandle", "DurableHandle", "AsyncDurableHandle"),
]

DECORATED = """
from abc import ABC
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from qserve import serve

T = TypeVar("T")

@serve.deployment(num_replicas=2)
class Counter:
    def __init__(self, start: int = 0) -> None: ...
    def add(self, amount: int) -> int:
        return amount
    limit: int = 3
    def first(self, items: list[T]) -> T:
        return items[0]

@serve.deployment
class Abstract(ABC):
    def ask(self) -> str:
        return ""

class Derived(Counter):
    limit = 4

class MetaclassOfItsOwn(type): ...

@serve.deployment
class Other(metaclass=MetaclassOfItsOwn): ...

@serve.deployment
async def double(number: int) -> str:
    return str(number)

Counter.options(name="other").deploy(3)
handle = Counter.get_handle()
reveal_type(handle)
reveal_type(handle.add)
handle.subtract
deployed: serve.Deployment[Callable[[int], Coroutine[Any, Any, str]]] = double
counter: Counter = Counter.func_or_class()
reveal_type(handle.limit)
reveal_type(double.get_handle().anything)
reveal_type(Abstract.get_handle().ask)
reveal_type(Counter.bind(3))
reveal_type(Counter.options(num_replicas=3).bind())
reveal_type(serve.run(Counter.bind(3)).add.remote(2))
reveal_type(handle.first.remote([3]))
reveal_type(Other)
class Composed:
    def __init__(self, counter: serve.DeploymentHandle[Counter]) -> None: ...
"""

COMPLETED = """
from qserve import serve
serve.deployment()
double = serve.deployment(lambda number: number)
double.options()
double.get_handle().options()
double.get_handle().options(durable=True, )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that uses qserve."""
    folder = tmp_path_factory.mktemp("editors")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "decorated.py").write_text(DECORATED)
    (folder / "completed.py").write_text(COMPLETED)
    (folder / "pyrightconfig.json").write_text(
        json.dumps(
            {
                "extraPaths": [str(ROOT)],
                "typeCheckingMode": "standard",
                "venvPath": str(Path(sys.prefix).parent),
                "venv": Path(sys.prefix).name,
            }
        )
    )
    (folder / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nplugins = qserve.mypy_plugin\nmypy_path = {ROOT}\nfollow_imports = silent\n"
    )
    return folder


@pytest.fixture(scope="module")
def mypy_says(folder: Path) -> list[list[str]]:
    """File, line, kind and text of all that mypy reports."""
    files = [str(folder / name) for name in ("program.py", "decorated.py")]
    cache = str(folder / "cache")
    report, errors, _ = api.run(["--config-file", str(folder / "mypy.ini"), "--cache-dir", cache, *files])
    assert errors == ""
    found = [line.split(":", 3) for line in report.splitlines()[:-1]]
    return [[Path(file).name, number, kind.strip(), text.strip()] for file, number, kind, text in found]


@pytest.mark.timeout(120)
def test_mypy_finds_each_mistake_where_it_is(mypy_says: list[list[str]]) -> None:
    lines = [each for each in mypy_says if each[0] == "program.py"]
    assert {int(number) for _, number, kind, _ in lines if kind == "error"} == WRONG
    revealed = [text.rpartition("qserve.")[2] for *_, text in lines if "Revealed type" in text]
    assert [text.split(".")[-1].strip('"') for text in revealed] == REVEALED


@pytest.mark.timeout(120)
def test_with_its_plugin_mypy_knows_classes_as_deployments_and_the_methods_of_handles(
    mypy_says: list[list[str]],
) -> None:
    assert [(kind, text) for file, _, kind, text in mypy_says if file == "decorated.py"] == [
        ("note", 'Revealed type is "qserve.calls.handle.DeploymentHandle[decorated.Counter]"'),
        (
            "note",
            'Revealed type is "qserve.calls.handle.DeploymentHandle'
            '[def (amount: int | qserve.calls.ref.Ref[Any]) -> int]"',
        ),
        ("error", 'Deployment of "Counter" has no method "subtract"  [misc]'),
        ("note", 'Revealed type is "qserve.calls.handle.DeploymentHandle[int]"'),
        ("note", 'Revealed type is "qserve.calls.handle.DeploymentHandle[Any]"'),  # of a function, anything
        ("note", 'Revealed type is "qserve.calls.handle.DeploymentHandle[def () -> str]"'),
        ("note", 'Revealed type is "qserve.deployments.binding.Application[decorated.Counter]"'),
        ("note", 'Revealed type is "qserve.deployments.binding.Application[decorated.Counter]"'),
        ("note", 'Revealed type is "qserve.calls.ref.Ref[int]"'),
        ("note", 'Revealed type is "qserve.calls.ref.Ref[Any]"'),  # of a generic method, anything
        ("note", 'Revealed type is "def () -> decorated.Other"'),  # it keeps the metaclass it has
    ]


@pytest.mark.timeout(120)
def test_pyright_finds_each_mistake_where_it_is(folder: Path) -> None:
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "program.py"]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = {each["range"]["start"]["line"] + 1 for each in found if each["severity"] == "error"}
    assert lines == WRONG
    told = [each["message"].rpartition(' is "')[2].strip('"') for each in found if each["severity"] == "information"]
    assert told == REVEALED


class LanguageServer:
    """What an editor talks to."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.asked = 0

    def open(self, name: str) -> None:
        """Begin, and show a file."""
        root = self.folder.as_uri()
        folders = [{"uri": root, "name": "project"}]
        self.ask("initialize", processId=None, rootUri=root, capabilities={}, workspaceFolders=folders)
        self.tell("initialized")
        path = self.folder / name
        document = {"uri": path.as_uri(), "languageId": "python", "version": 1, "text": path.read_text()}
        self.tell("textDocument/didOpen", textDocument=document)

    def tell(self, method: str, **params: Any) -> None:
        self._send({"method": method, "params": params})

    def ask(self, method: str, **params: Any) -> Any:
        self.asked += 1
        self._send({"id": self.asked, "method": method, "params": params})
        while True:
            message = self._read()
            if "method" in message and "id" in message:  # it asks for the settings of the editor
                self._send({"id": message["id"], "result": [None] * len(message["params"].get("items", []))})
            elif message.get("id") == self.asked:
                return message["result"]

    def completions(self, name: str, line: int, after: str) -> set[str]:
        """What the editor offers behind some text of a line, without the names that the program has itself."""
        path = self.folder / name
        position = {"line": line, "character": path.read_text().splitlines()[line].index(after) + len(after)}
        found = self.ask("textDocument/completion", textDocument={"uri": path.as_uri()}, position=position)
        labels = (each["label"] for each in found["items"])
        return {label.removesuffix("=") for label in labels if label.endswith("=")}

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        length = 0
        while (line := stdout.readline().strip()) or not length:
            if not line and self.process.poll() is not None:
                raise AssertionError("the language server has ended")
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return cast("dict[str, Any]", json.loads(stdout.read(length)))


@pytest.fixture
def editor(folder: Path) -> Iterator[LanguageServer]:
    """An editor in which `completed.py` is open."""
    command = [str(Path(sys.executable).with_name("basedpyright-langserver")), "--stdio"]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            server = LanguageServer(process, folder)
            server.open("completed.py")
            yield server
        finally:
            process.terminate()


@pytest.mark.timeout(120)
def test_an_editor_offers_the_names_of_all_options(editor: LanguageServer) -> None:
    options = set(GivenOptions.__annotations__)
    assert editor.completions("completed.py", 2, "serve.deployment(") >= options
    assert editor.completions("completed.py", 4, "double.options(") >= options
    assert editor.completions("completed.py", 5, ".options(") >= {*Changes.__annotations__, "method_name", "stream"}
    assert editor.completions("completed.py", 6, "durable=True, ") >= set(DurableTerms.__annotations__)
