"""Importing an application by its name, MODULE or MODULE:NAME."""

from typing import Any

from qserve.deployments.deployment import Deployment
from qserve.deployments.loading import find_attribute, import_module, importing
from qserve.errors import ConfigurationError


def import_app(text: str) -> "list[Deployment[Any]]":
    """Import an application and return its deployments. Nothing is deployed by that.

    Args:
        text: "MODULE" for all deployments of a module, "MODULE:NAME" for one of them or for a list of some.

    Raises:
        ConfigurationError: The application cannot be imported, or there is no deployment in it.
    """
    module_name, _, name = text.partition(":")
    if not module_name or text.endswith(":"):
        raise ConfigurationError(f'Import string "{text}" must be in format "<module>" or "<module>:<name>".')
    if module_name.endswith(".py") or "/" in module_name:
        suggestion = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ConfigurationError(f'"{module_name}" is a file; give the module instead: "{suggestion}".')
    with importing():
        module = import_module(module_name)
        values = [find_attribute(module, name)] if name else list(vars(module).values())
    if name and isinstance(values[0], list | tuple):
        values = list(values[0])
    found = list({id(value): value for value in values if isinstance(value, Deployment)}.values())
    if not found or (name and len(found) < len(values)):
        wrong = next((value for value in values if not isinstance(value, Deployment)), None) if name else None
        seen = f"; it has {type(wrong).__name__} objects" if wrong is not None else ""
        raise ConfigurationError(
            f"There is nothing to deploy in {text!r}{seen}. Decorate a class or function with @serve.deployment; "
            "an ASGI application becomes one with serve.deployment(serve.ingress(app)(SomeClass))."
        )
    _check_names(found, text)
    return found


def _check_names(deployments: "list[Deployment[Any]]", text: str) -> None:
    seen: dict[str, Deployment[Any]] = {}
    for deployment in deployments:
        if deployment.name in seen:
            raise ConfigurationError(
                f"Two deployments in {text!r} are named {deployment.name!r}. Give one of them another with name=."
            )
        seen[deployment.name] = deployment
