"""Importing an application by its name, MODULE or MODULE:NAME."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from qserve.applications.app_builder import build, is_builder
from qserve.applications.graph import make_graph, parts_of
from qserve.deployments.binding import Application
from qserve.deployments.deployment import Deployment
from qserve.deployments.loading import find_attribute, import_module, importing
from qserve.errors import ConfigurationError


def import_app(text: str, arguments: Mapping[str, Any] | None = None) -> "list[Deployment[Any]]":
    """Import an application and return its deployments. Nothing is deployed by that.

    Args:
        text: "MODULE" for the application of a module, or else for all its deployments; "MODULE:NAME" for one of them,
            for a list of some, or for a function that builds an application. A file stands for the module that it is.
        arguments: What such a function gets.

    Raises:
        ConfigurationError: The application cannot be imported, or there is no deployment in it.
    """
    found = import_target(text, arguments)
    return [*make_graph(found).deployments] if isinstance(found, Application) else found


def import_target(text: str, arguments: Mapping[str, Any] | None = None) -> "Application[Any] | list[Deployment[Any]]":
    """Like `import_app`, with an application as it is."""
    with importing():
        return _import_target(text, arguments or {})


def import_one_app(text: str, arguments: Mapping[str, Any]) -> Application[Any]:
    """Like `import_app`, for one application; a deployment that is not bound is one without arguments.

    Raises:
        ConfigurationError: It cannot be imported, or it is no single application.
    """
    found = import_target(text, arguments)
    if isinstance(found, Application):
        return found
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise ConfigurationError(
            f"{text!r} has several deployments ({names}), and is no application. Name one, as in "
            f"'{text.partition(':')[0]}:{found[0].name}', or put them together with bind()."
        )
    return found[0].bind()


def _import_target(text: str, arguments: Mapping[str, Any]) -> "Application[Any] | list[Deployment[Any]]":
    module_name, _, name = text.partition(":")
    if not module_name or text.endswith(":"):
        raise ConfigurationError(f'Import string "{text}" must be in format "<module>" or "<module>:<name>".')
    is_file = module_name.endswith(".py") or "/" in module_name
    module = _import_file(Path(module_name)) if is_file else import_module(module_name)
    values = [find_attribute(module, name)] if name else list(vars(module).values())
    if name and is_builder(values[0]):
        return build(values[0], text, arguments)
    if arguments:
        raise ConfigurationError(
            f"{text!r} takes no arguments ({', '.join(arguments)}): it is no function that builds an application."
        )
    if name and isinstance(values[0], list | tuple):
        values = list(values[0])
    if application := _application_of(values, vars(module), "" if name else text):
        return application
    found = list({id(value): value for value in values if isinstance(value, Deployment)}.values())
    if not found or (name and len(found) < len(values)):
        wrong = [value for value in values if not isinstance(value, Deployment)] if name else []
        seen = f": it is {_kind_of(wrong[0])}" if wrong else ""
        raise ConfigurationError(
            f"There is nothing to deploy in {text!r}{seen}. Decorate a class or function with @serve.deployment; "
            "an ASGI application becomes one with serve.deployment(serve.ingress(app)(SomeClass))."
        )
    _check_names(found, text)
    return found


def _application_of(values: list[Any], names: Mapping[str, Any], module: str) -> Application[Any] | None:
    """The application among the values; of a whole module, the one that is called `app`, or is no part of another."""
    found = {id(value): value for value in values if isinstance(value, Application)}
    used = {id(each) for application in found.values() for each in parts_of(application)}
    roots = [application for id_, application in found.items() if id_ not in used]
    if len(roots) > 1 and isinstance(names.get("app"), Application):
        return cast(Application[Any], names["app"])
    if len(roots) > 1:
        known = [name for name, value in names.items() if any(value is root for root in roots)]
        raise ConfigurationError(
            f"There are several applications in {module!r}: name one, as in {f'{module}:{known[0]}'!r} (of "
            f"{', '.join(known)})."
        )
    return roots[0] if roots else None


def _import_file(path: Path) -> ModuleType:
    """Import the module that a file is, as part of its package if it is in one."""
    if path.suffix != ".py" or not path.is_file():
        inside = f" It is a folder; name a file in it, such as {str(path / 'app.py')!r}." if path.is_dir() else ""
        raise ConfigurationError(f"There is no Python file {str(path)!r}.{inside}")
    path = path.resolve()
    names, folder = [path.stem] if path.stem != "__init__" else [], path.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module = import_module(".".join(names))
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigurationError(
            f"The file {str(path)!r} would be the module {module.__name__!r}, and another module of that name is "
            f"imported: {module.__file__ or 'a built-in one'}. Rename the file."
        )
    return module


def _kind_of(value: object) -> str:
    if inspect.isclass(value):
        return "a class that is not decorated"
    if inspect.isfunction(value):
        return "a function that is not decorated"
    return f"an object of the class {type(value).__name__}"


def _check_names(deployments: "list[Deployment[Any]]", text: str) -> None:
    seen: dict[str, Deployment[Any]] = {}
    for deployment in deployments:
        if deployment.name in seen:
            raise ConfigurationError(
                f"Two deployments in {text!r} are named {deployment.name!r}. Give one of them another with name=."
            )
        seen[deployment.name] = deployment
