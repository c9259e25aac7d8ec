"""Functions that build an application from arguments: `def app(args: dict | SomeModel) -> Application`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, get_type_hints

from pydantic import BaseModel

from qserve.deployments.binding import Application
from qserve.deployments.deployment import Deployment
from qserve.deployments.loading import user_traceback
from qserve.deployments.option_errors import told_in_words
from qserve.errors import ConfigurationError


def is_builder(value: object) -> TypeGuard[Callable[..., Any]]:
    """Whether this may be a function that builds an application: a plain one, with at most one parameter to give."""
    if not inspect.isfunction(value) or inspect.iscoroutinefunction(value) or inspect.isgeneratorfunction(value):
        return False
    return len(_parameters(value)) <= 1


def build(builder: Callable[..., Any], text: str, arguments: Mapping[str, Any]) -> Application[Any]:
    """Call a function that builds an application.

    Args:
        text: How the function was named.
        arguments: What it gets: as a dict, or as the pydantic model that its parameter is annotated with.

    Raises:
        ConfigurationError: The arguments do not fit, it has raised, or what it returned is no application.
    """
    parameters = _parameters(builder)
    if arguments and not parameters:
        raise ConfigurationError(f"{text!r} takes no arguments ({', '.join(arguments)}): give it one parameter.")
    given = [_as_parameter(builder, parameters[0], text, arguments)] if parameters else []
    try:
        built = builder(*given)
    except Exception as exc:
        raise ConfigurationError(
            f"{text!r} was called with {dict(arguments)!r} to build an application, because it is a function that is "
            f"not decorated with @serve.deployment, and failed:\n{user_traceback(exc)}"
        ) from exc
    if isinstance(built, Deployment):
        return built.bind()
    if not isinstance(built, Application):
        raise ConfigurationError(
            f"There is nothing to deploy in {text!r}: it is a function that is not decorated. It was called to build "
            f"an application, and returned {built!r}. Decorate it with @serve.deployment if it is what you want to "
            "serve, or let it return Deployment.bind(...)."
        )
    return built


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [
        each
        for each in inspect.signature(function).parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        or (each.kind == each.KEYWORD_ONLY and each.default is each.empty)
    ]


def _as_parameter(
    builder: Callable[..., Any], parameter: inspect.Parameter, text: str, arguments: Mapping[str, Any]
) -> Any:
    try:
        wanted = get_type_hints(builder).get(parameter.name)
    except NameError:  # an annotation that is there for type checkers only
        wanted = None
    if not (inspect.isclass(wanted) and issubclass(wanted, BaseModel)):
        return dict(arguments)
    try:
        with told_in_words(wanted.model_fields):
            return wanted(**arguments)
    except ValueError as exc:
        raise ConfigurationError(f"The arguments of {text!r} do not fit its {wanted.__name__}: {exc}") from None
