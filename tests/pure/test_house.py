"""What must stay true of the code base: import direction, public names, and documents that list what the code has."""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

import qserve
from qserve import serve
from tests.support.serving import ROOT
from tests.support.sources import SOURCES
from tests.support.tables import CONFIGURATION, TABLES, with_tables

HOME_OF = {
    "celery": {"qserve_workers"},
    "kombu": {"qserve_workers"},
    "billiard": {"qserve_workers"},
    "uvicorn": {"qserve_gateway"},
    "httptools": {"qserve_gateway"},
    "click": {"qserve.cli", "qserve_gateway.__main__", "qserve_workers"},
    "rich": {"qserve.cli", "qserve.screen"},
    "yaml": {"qserve.config_file"},
}
"""Foreign libraries that have one home; elsewhere their names do not appear."""


def imports_of(path: Path) -> Iterator[str]:
    """Modules a file imports at run time, also inside functions; those for type checkers only do not count."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from qserve import embedded` imports qserve.broker.server.embedded where that is a module
            yield from (
                full if (full := f"{node.module}.{alias.name}") in SOURCES else node.module for alias in node.names
            )
        pending += ast.iter_child_nodes(node)


IMPORTS = {module: set(imports_of(path)) for module, path in SOURCES.items()}


def levels() -> list[set[str]]:
    """The module order as docs/architecture.md prints it, lowest first."""
    text = (ROOT / "docs/architecture.md").read_text()
    found = re.search(r"<!-- module order -->\n```text\n(.*?)```", text, re.DOTALL)
    assert found
    return [set(line.split()) for line in reversed(found[1].splitlines())]


def name_in(listed: set[str], module: str) -> str | None:
    """How the list names a module: by itself, or as one of the room `package.folder.*`."""
    room = ".".join(module.split(".")[:2])
    names = [module, f"{room}.*"]
    return next((name for name in names if name in listed), None)


def test_every_module_has_its_place_in_the_order() -> None:
    listed = set.union(*levels())
    assert [module for module in SOURCES if name_in(listed, module) is None] == []
    assert [name for name in listed if name.removesuffix(".*") not in SOURCES] == []


def test_modules_import_downwards_only() -> None:
    order = levels()
    listed = set.union(*order)
    place = {name: level for level, names in enumerate(order) for name in names}
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets & SOURCES.keys()
        for here, there in [(name_in(listed, module), name_in(listed, target))]
        if here
        and there
        and place[there] >= place[here]
        # inside one room the test for cycles is enough
        and not (here == there and here.endswith(".*"))
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    for module in SOURCES:
        reached, pending = set(), [target for target in IMPORTS[module] if target in SOURCES]
        while pending:
            target = pending.pop()
            if target not in reached:
                reached.add(target)
                pending += [each for each in IMPORTS[target] if each in SOURCES]
        assert module not in reached, f"{module} is part of a cycle"


def test_the_packages_keep_apart() -> None:
    forbidden = {
        "qserve": {"qserve_gateway", "qserve_workers"},
        "qserve_gateway": {"qserve_workers"},
        "qserve_workers": {"qserve_gateway"},
    }
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if target.partition(".")[0] in forbidden[module.partition(".")[0]]
    ]
    assert wrong == []


def test_foreign_libraries_stay_in_their_homes() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        for homes in [HOME_OF.get(target.partition(".")[0])]
        if homes is not None and not any(module == home or module.startswith(f"{home}.") for home in homes)
    ]
    assert wrong == []


_COMMAND_METHOD = re.compile(
    r"x(add|ack|autoclaim|claim|del|len|trim|(rev)?range|read\w*|group\w*|info\w*|pending\w*)"
    r"|h(del|exists|incrby|keys|len|m?get(all)?|set(nx)?)|z(add|card|range\w*|rem\w*|score)"
    r"|[lr](push|pop|range|rem)|blmove|s(add|members|rem|etnx)|getdel|p(expire|ttl)|incr(by)?"
    r"|eval(sha)?|execute_command|pubsub"
)
"""Methods that only clients of Redis have; others of theirs count where they are called on what is named like one."""
_ON_CLIENTS = {name for name in dir(Redis) if not name.startswith("_")} - {"client", "close"}


def redis_in(source: str) -> Iterator[str]:
    """What a module says to Redis by itself: imports of a client library, methods of clients, commands, scripts."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if alias.name.partition(".")[0] in ("redis", "hiredis")]
                yield from (f"line {node.lineno}: imports {name}" for name in found)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in ("redis", "hiredis"):
                yield f"line {node.lineno}: imports {module}"
            case ast.ImportFrom(module="qserve.broker.scripts"):
                yield f"line {node.lineno}: imports scripts"
            case ast.Call(func=ast.Attribute(value=receiver, attr=method), args=args):
                words = [arg.value for arg in args[:2] if isinstance(arg, ast.Constant)]
                on_client = re.search(r"(^|[._])(redis|client)$", ast.unparse(receiver)) and method in _ON_CLIENTS
                if on_client or _COMMAND_METHOD.fullmatch(method):
                    yield f"line {node.lineno}: calls .{method}()"
                elif method in ("call", "send", "send_now") and any(
                    isinstance(word, str) and re.fullmatch("[A-Z]{2,}", word) for word in words
                ):
                    yield f"line {node.lineno}: sends {words}"


def test_redis_is_spoken_in_the_broker_folder_only() -> None:
    """Every command is a function there which says what it does for qserve; so it can be found, and changed, once."""
    found = {
        module: list(redis_in(path.read_text()))
        for module, path in SOURCES.items()
        if not module.startswith("qserve.broker.")
    }
    assert {module: said for module, said in found.items() if said} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import redis",
        "import redis.asyncio",
        "from redis.exceptions import RedisError",
        "import hiredis",
        "from qserve.broker.scripts import ADMIT",
        "self._redis.hget(key, 'x')",
        "client.set(key, 1)",
        "state.redis.delete(key)",
        "client.eval(text, 0)",
        "connection.send(ignore_answer, 'DEL', key)",
        "await self._link.sender.call('XLEN', key)",
        "client.execute_command('GET', key)",
    ],
)
def test_a_command_outside_of_the_broker_folder_is_found(line: str) -> None:
    assert len(list(redis_in(f"async def f():\n    {line}"))) == 1


@pytest.mark.parametrize(
    "line",
    ["found.get('GET')", "event.set()", "channel.send('hello')", "state.get(name)", "redis_clients.client(url, 1.0)"],
)
def test_what_only_looks_like_a_command_is_let_be(line: str) -> None:
    assert list(redis_in(f"async def f():\n    {line}")) == []


def errors_of_qserve() -> set[str]:
    members = vars(qserve.errors).items()
    return {name for name, value in members if inspect.isclass(value) and issubclass(value, qserve.QServeError)}


def test_the_public_names_are_these() -> None:
    """A name added here is a promise; one taken away breaks somebody."""
    assert set(qserve.__all__) - errors_of_qserve() == {"Ref", "get", "serve", "wait"}
    assert set(serve.__all__) == {
        "Application",
        "ApplicationStatus",
        "ApplicationStatusOverview",
        "AsyncDeploymentHandle",
        "AutoscalingConfig",
        "AutoscalingContext",
        "AutoscalingPolicy",
        "BackPressureError",
        "Counter",
        "Deployment",
        "DeploymentHandle",
        "DeploymentResponse",
        "DeploymentResponseGenerator",
        "DeploymentStatus",
        "DeploymentUnavailableError",
        "DurableRef",
        "Gauge",
        "HTTPOptions",
        "Histogram",
        "Location",
        "LoggingConfig",
        "ProxyLocation",
        "RayServeException",
        "ReplicaContext",
        "ReplicaRank",
        "ReplicaUnavailableError",
        "RequestCancelledError",
        "RunTarget",
        "ServeStatus",
        "batch",
        "delete",
        "deployment",
        "get_app_handle",
        "get_deployment",
        "get_deployment_handle",
        "get_multiplexed_model_id",
        "get_ref",
        "get_replica_context",
        "ingress",
        "list_deployments",
        "metrics",
        "multiplexed",
        "run",
        "run_many",
        "schedule",
        "shutdown",
        "shutdown_async",
        "start",
        "status",
        "unschedule",
    }


def test_every_error_is_public_and_exported_names_exist() -> None:
    assert errors_of_qserve() <= set(qserve.__all__)
    assert [name for module in (qserve, serve) for name in module.__all__ if not hasattr(module, name)] == []


def test_the_tables_of_the_configuration_page_follow_from_the_code() -> None:
    page = CONFIGURATION.read_text()
    assert all(f"<!-- table: {name} -->" in page for name in TABLES)
    assert with_tables(page) == page, "`make tables` writes them anew"


def test_every_error_a_caller_may_see_is_in_the_guarantees() -> None:
    text = (ROOT / "docs/guarantees.md").read_text()
    internal = {"FrameRejected", "NoInstanceError", "ConfigurationError"}
    named = set(re.findall(r"`(?:qserve\.)?(\w+)`", text))
    assert errors_of_qserve() - internal - named == set()


def test_the_package_tells_its_version() -> None:
    assert qserve.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_changelog_has_the_version_in_the_form_of_keep_a_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert any(release.startswith(f"[{version}]") for release in releases)
    assert [each for each in releases if not re.fullmatch(r"\[[\d.]+\] - (Unreleased|\d{4}-\d\d-\d\d)", each)] == []
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_decision_is_listed_and_says_why() -> None:
    folder = ROOT / "docs/decisions"
    pages = {path.name: path.read_text() for path in folder.glob("*.md")}
    index = pages.pop("README.md")
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages.keys()
    for name, text in pages.items():
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings in (
            ["Context", "Decision", "Measured", "Consequences"],
            ["Context", "Decision", "Why", "Consequences"],
        ), name
        assert f"[{text.partition(chr(10))[0].removeprefix('# ')}]({name})" in index


def test_contributors_are_told_of_every_make_target_and_of_no_other() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    targets = set(phony[1].split())
    told = set(re.findall(r"^\| `make ([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert told == targets
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for path in documents for name in re.findall(r"`make ([a-z-]+)", path.read_text())}
    assert named <= targets


def test_no_two_test_files_share_a_name_so_that_all_can_run_together() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
