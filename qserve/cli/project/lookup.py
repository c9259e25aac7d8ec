"""Where an application is looked for: what to import, from which folder, and what to say if it is not there."""

import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from dotenv import load_dotenv

from qserve.cli.project.hidden_modules import refuse_hidden_modules
from qserve.errors import ConfigurationError

Command = TypeVar("Command", bound=Callable[..., Any])

_USUAL = ("app.py", "main.py", "app/__init__.py", "app/main.py")
"""What is served if nothing is named, the first of these that exists."""
_DEPTH = 3


def app_argument(command: Command) -> Command:
    """The argument `app`, MODULE or FILE, its `arguments`, and the option `--app-dir`."""
    decorated = click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1, callback=_as_mapping)(command)
    decorated = click.argument("app", metavar="[MODULE|FILE[:NAME]]", envvar="QSERVE_APP", required=False)(decorated)
    return click.option(
        "--app-dir",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder to import from. Default: this one.",
    )(decorated)


def _as_mapping(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    for each in given:
        if "=" not in each:
            raise click.BadParameter(f"{each!r} is no KEY=VALUE. One module or file can be named.")
    return dict(each.split("=", 1) for each in given)


def is_config_file(app: str) -> bool:
    """Whether an application's name is that of a config file."""
    return app.endswith((".yaml", ".yml", ".json"))


def load_env_file(path: Path) -> None:
    """Set what a .env file names, unless it is set already; without effect where there is none."""
    if path.is_file():
        load_dotenv(path, override=False)


class FoundApp(NamedTuple):
    """What to import, and from which folder, which is the first on `sys.path`."""

    name: str
    folder: Path


def find_app(app: str | None, app_dir: Path | None) -> FoundApp:
    """Find out what to serve.

    Without `app`, it is what pyproject.toml names (`[tool.qserve] app = "module:name"`, and `app-dir`), or app.py or
    main.py in this folder.

    Raises:
        ConfigurationError: None of these is there, or pyproject.toml cannot be read.
    """
    if app is None:
        named, folder = _of_pyproject(Path.cwd())
        if named and folder and is_config_file(named):
            named = str(folder / named)
        app, app_dir = named or _usual(app_dir or Path.cwd()), app_dir or folder
    folder = (app_dir or Path.cwd()).resolve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    refuse_hidden_modules(folder)
    return FoundApp(_inside_package(app, folder), folder)


def _of_pyproject(start: Path) -> tuple[str | None, Path | None]:
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            section = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("qserve", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
        unknown = section.keys() - {"app", "app-dir"}
        if unknown or not all(isinstance(value, str) for value in section.values()):
            raise ConfigurationError(
                f'[tool.qserve] in {path} may have app = "MODULE:NAME" and app-dir = "FOLDER"'
                + (f", and has {', '.join(sorted(unknown))}." if unknown else ".")
            )
        return section.get("app"), folder / section.get("app-dir", ".") if "app" in section else None
    return None, None


def _usual(folder: Path) -> str:
    for name in _USUAL:
        if (folder / name).is_file():
            return str(folder / name)
    raise ConfigurationError(
        f"There is no {_USUAL[0]} or {_USUAL[1]} in {folder}, and no [tool.qserve] with an app in a pyproject.toml. "
        "Name what is to be served: `qserve run MODULE`. `qserve init` writes an example."
    )


def _inside_package(app: str, folder: Path) -> str:
    """A module beside an __init__.py is one of that package, and may import relatively."""
    module, colon, name = app.partition(":")
    if not (folder / "__init__.py").is_file() or "/" in module or module.endswith(".py") or is_config_file(app):
        return app
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    return f"{file}{colon}{name}" if file.is_file() else app


def where_it_was_looked_for(app: FoundApp) -> str:
    """A sentence about the folder that was searched, with the line that works if the module is somewhere below it."""
    module, _, name = app.name.partition(":")
    after = f":{name}" if name else ""
    folder = Path.cwd()
    looked = f" Looked in {app.folder} and among the installed packages."
    for found in _files_named(folder, module):
        root, parts = found.parent, [found.stem] if found.stem != "__init__" else []
        while (root / "__init__.py").is_file() and root != folder:
            root, parts = root.parent, [root.name, *parts]
        place = root.relative_to(folder)
        directory = "" if str(place) == "." else f"--app-dir {place} "
        return f"{looked} There is {found.relative_to(folder)}: `qserve run {directory}{'.'.join(parts)}{after}`"
    return looked


def _files_named(folder: Path, module: str) -> Iterator[Path]:
    wanted = module.split(".")
    for base, folders, _files in os.walk(folder):
        here = Path(base)
        deep = len(here.relative_to(folder).parts) >= _DEPTH
        folders[:] = [] if deep else sorted(each for each in folders if not each.startswith((".", "__")))
        for path in (here.joinpath(*wanted).with_suffix(".py"), here.joinpath(*wanted, "__init__.py")):
            if path.is_file():
                yield path
