"""Where `qserve run` looks for an application, and what it says when there is none."""

import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qserve.cli.application import Imported, import_found
from qserve.cli.command_line import main
from qserve.cli.project.init import _NAMES
from qserve.cli.project.lookup import app_argument, find_app
from qserve.cli.project.overrides import Overrides, override_options
from qserve.cli.run import serve_until_ctrl_c
from qserve.deployments.local_instance import LaunchOptions, launch
from qserve.errors import ConfigurationError
from qserve.settings import Settings

APP = """
from qserve import serve

@serve.deployment
def hello() -> str:
    return "hello"
"""
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes files below a folder that is the current one; what is imported from there is forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QSERVE_APP", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = set(sys.modules)

    def write_file(name: str, text: str = APP) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    yield write_file
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def imported(app: str | None = None, app_dir: Path | None = None) -> Imported:
    return import_found(find_app(app, app_dir))


@pytest.mark.parametrize("file", ["app.py", "main.py", "app/__init__.py", "app/main.py"])
def test_without_an_argument_the_usual_files_are_tried(write: Write, file: str) -> None:
    write(file, APP)
    assert [each.name for each in imported().deployments] == ["hello"]


def test_the_command_line_names_an_application_and_its_path(write: Write) -> None:
    write("app.py", APP + "app = hello.bind()\n")
    write("plain.py", APP)
    for module in ("app", "plain"):
        found = import_found(find_app(module, None), Overrides(name="shop", route_prefix="/shop", replicas=2))
        assert [(each.name, each.route_prefix, each.num_replicas) for each in found.deployments] == [
            ("shop.hello", "/shop", 2)
        ]
    with pytest.raises(ConfigurationError, match="must start with '/'"):
        import_found(find_app("app", None), Overrides(route_prefix="shop"))


def test_the_command_line_is_the_same_when_it_is_written_again(write: Write) -> None:
    @click.command()
    @app_argument
    @override_options
    def show(app: str, app_dir: Path, overrides: Overrides) -> None:
        seen.append(overrides)

    seen: list[Overrides] = []
    show.main(["app", "a=b", "--name", "shop", "--route-prefix", "/x", "--replicas", "3"], standalone_mode=False)
    show.main(["app", *seen[0].as_arguments()], standalone_mode=False)
    assert seen == [Overrides(3, "shop", "/x", {"a": "b"})] * 2


def test_pyproject_names_the_application_from_any_folder_below(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("pyproject.toml", '[tool.qserve]\napp = "served_here:hello"\napp-dir = "src"\n')
    write("src/served_here.py", APP)
    monkeypatch.chdir(write("docs/x", "").parent)
    found = imported()
    assert [each.name for each in found.deployments] == ["hello"]
    assert [path.name for path in found.files] == ["served_here.py"]


def test_what_pyproject_cannot_say_is_told(write: Write) -> None:
    write("pyproject.toml", '[tool.qserve]\nentrypoint = "app"\n')
    with pytest.raises(ConfigurationError, match=r'may have app = "MODULE:NAME" .*, and has entrypoint'):
        find_app(None, None)


def test_a_module_inside_of_a_package_may_import_relatively(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("shop/__init__.py", "")
    write("shop/names.py", "NAME = 'hello'")
    write("shop/served.py", "from .names import NAME\n" + APP)
    for app, folder in (("shop.served", "."), ("served", "shop"), ("served.py", "shop"), ("shop/served.py", ".")):
        monkeypatch.chdir(write("x", "").parent / folder)
        code = imported(app).deployments[0].func_or_class
        assert code.__module__ == "shop.served"


def test_another_folder_can_be_named(write: Write) -> None:
    write("elsewhere/apart.py", APP)
    assert imported("apart", Path("elsewhere")).deployments[0].name == "hello"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("deep/er/lost.py", "qserve run --app-dir deep/er lost"),
        ("src/pkg/lost.py", "qserve run --app-dir src pkg.lost"),
    ],
)
def test_a_module_that_is_not_found_is_told_with_the_folder_and_the_line_that_works(
    write: Write, file: str, line: str
) -> None:
    where = write(file, APP)
    if "pkg" in file:
        write(str(Path(file).parent / "__init__.py"), "")
    with pytest.raises(ConfigurationError) as caught:
        imported("lost")
    assert f"Looked in {Path.cwd()}" in str(caught.value)
    assert f"There is {file}: `{line}`" in str(caught.value)
    folder, name = line.split()[-2:]
    assert where in imported(name, Path(folder)).files


@pytest.mark.parametrize("name", ["random.py", "queue.py", "redis.py", "fastapi/__init__.py", "qserve.py"])
def test_a_file_that_hides_a_module_is_named(write: Write, name: str) -> None:
    path = write(name, "")
    write("app.py", APP)
    shown = path.parent if path.name == "__init__.py" else path
    with pytest.raises(ConfigurationError, match=rf"^{shown} hides the (standard )?module '{shown.stem}'"):
        find_app(None, None)


def test_names_of_the_standard_library_that_nothing_needs_may_be_taken(write: Write) -> None:
    write("antigravity.py", "")
    write("app.py", APP)
    assert imported().deployments


def test_a_folder_without_an_application_is_told_what_to_do(write: Write) -> None:
    write("notes.txt", "")
    with pytest.raises(ConfigurationError, match=r"There is no app.py or main.py in .*qserve init"):
        find_app(None, None)


def test_the_env_file_sets_what_is_not_set(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(".env", "FROM_FILE=1\nQSERVE_NAMESPACE=of-the-file\n")
    monkeypatch.setenv("QSERVE_NAMESPACE", "of-the-shell")
    monkeypatch.delenv("FROM_FILE", raising=False)
    CliRunner().invoke(main, ["init", "--help"])
    assert os.environ["QSERVE_NAMESPACE"] == "of-the-shell"
    assert os.environ.pop("FROM_FILE") == "1"


@pytest.mark.parametrize("template", _NAMES)
def test_init_writes_an_application_that_is_found_again(write: Write, template: str) -> None:
    done = CliRunner().invoke(main, ["init", "--template", template])
    assert done.exit_code == 0, done.output
    assert len(imported().deployments) == 1
    assert tomllib.loads(Path("pyproject.toml").read_text())["tool"]["qserve"] == {"app": "app"}
    before = write("app.py", "# mine").read_text()
    again = CliRunner().invoke(main, ["init", "--template", template])
    assert again.exit_code == 1
    assert "nothing was written" in again.output
    assert Path("app.py").read_text() == before


def test_what_is_not_installed_is_told_before_anything_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `pip install qserve`, without its extras."""
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("celery", "uvicorn") else find(name))
    with pytest.raises(ConfigurationError, match=r"\(celery, uvicorn\), so nothing was started: pip install"):
        launch(Settings(), LaunchOptions("127.0.0.1", 0, {}))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_told_before_the_application_asks_for_it(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install qserve`, and an application that imports FastAPI."""
    write("app.py", "import surely_not_installed")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    options: dict[str, Any] = dict.fromkeys(("app_dir", "host", "port", "data"))
    switches: dict[str, Any] = dict.fromkeys(("reload", "debug", "verbose"), False)

    with pytest.raises(ConfigurationError, match=r"\(fastapi\), so nothing was started: pip install 'qserve\[all\]'"):
        serve_until_ctrl_c(app="app", overrides=Overrides(), gateway_workers=1, **options, **switches)


@pytest.mark.parametrize(("options", "missing"), [((), "celery"), (("--gateway",), "celery, uvicorn")])
def test_a_node_whose_packages_are_not_installed_is_not_started(
    options: tuple[str, ...], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install qserve` brings the modules of nodes and gateways along, but not what they need."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("celery", "uvicorn") else find(name))

    done = CliRunner(env={"QSERVE_REDIS_URL": "redis://127.0.0.1:1"}).invoke(main, ["start", *options])

    assert f"({missing}), so nothing was started: pip install 'qserve[all]'" in done.output
    assert done.exit_code == 1
