"""The script that a driver runs. Replicas run it too, without its main block, where code cannot be pickled."""

import ast
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from qserve.errors import ConfigurationError

MAIN = "__main__"


def main_folder() -> str:
    """The folder from which the running script imports: its own, or with `python -m` the one that has its package."""
    main = sys.modules[MAIN]
    file = getattr(main, "__file__", None)
    if file is None:
        return str(Path.cwd())
    spec = getattr(main, "__spec__", None)
    return str(Path(file).resolve().parents[spec.name.count(".") if spec is not None else 0])


def can_run_again(file: str | None) -> bool:
    """Whether there is a script in this place that has a main block, so that other processes can run the rest of it."""
    if file is None or not file.endswith(".py") or not Path(file).is_file():
        return False
    tree = ast.parse(Path(file).read_bytes())
    return _without_main_block(tree) != tree.body


def script_import_path(qualname: str) -> str | None:
    """The import path by which other processes get at what the running script defines under a name.

    None where they must not run the script again: it has no `if __name__ == "__main__":` around what it starts, or
    defines the name there; or there is no file.
    """
    main = sys.modules[MAIN]
    file = getattr(main, "__file__", None)
    if file is None or not can_run_again(file):
        return None
    body = _without_main_block(ast.parse(Path(file).read_bytes()))
    if qualname.partition(".")[0] not in _names_bound_in(body):
        return None
    spec = getattr(main, "__spec__", None)
    return f"{Path(file).resolve() if spec is None else spec.name}:{qualname}"


def is_script(module_name: str) -> bool:
    """Whether the first part of an import path is a file."""
    return module_name.endswith(".py")


def run_script(path: str, *, as_main: bool) -> ModuleType:
    """Run a script, all but its main block.

    Args:
        as_main: It becomes the `__main__` of this process.

    Raises:
        ConfigurationError: There is no such file here.
        Exception: What the script raised.
    """
    running = getattr(sys.modules[MAIN], "__file__", None)
    if running is not None and Path(running).resolve() == Path(path):
        return sys.modules[MAIN]
    try:
        source = Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(
            f"The script {path!r} cannot be read on this machine ({exc.strerror}). Its code cannot be pickled, so each "
            "machine with replicas needs that file; or move the code into a module that is installed there."
        ) from exc
    module = ModuleType(MAIN if as_main else f"script {path}")
    module.__file__ = path
    module.__loader__ = SourceFileLoader(module.__name__, path)
    sys.modules[module.__name__] = module
    tree = ast.parse(source, path)
    tree.body = _without_main_block(tree)
    exec(compile(tree, path, "exec"), vars(module))  # noqa: S102  the user's own script
    return module


def _without_main_block(tree: ast.Module) -> list[ast.stmt]:
    body = list[ast.stmt]()
    for statement in tree.body:
        body += statement.orelse if isinstance(statement, ast.If) and _asks_for_main(statement) else [statement]
    return body


def _asks_for_main(statement: ast.If) -> bool:
    if not isinstance(statement.test, ast.Compare):
        return False
    sides = [statement.test.left, *statement.test.comparators]
    names = {side.id for side in sides if isinstance(side, ast.Name)}
    texts = {side.value for side in sides if isinstance(side, ast.Constant)}
    return names == {"__name__"} and texts == {MAIN} and isinstance(statement.test.ops[0], ast.Eq)


def _names_bound_in(body: list[ast.stmt]) -> set[str]:
    names = set[str]()
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return names
