"""A line that a user can copy to try a deployment, found in its code without running it."""

import ast
import inspect
import json
import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, get_args, get_origin, get_type_hints

from starlette.requests import Request
from starlette.routing import Route

from qserve.deployments.deployment import Deployment

_WORDS: Final[Mapping[str, str]] = {"name": "Ada", "user": "Ada", "text": "hello", "prompt": "hello"}
_VALUES: Final[Mapping[Any, Any]] = {int: 1, float: 1.5, str: "hello", bool: True}
_NOT_FOR_CALLERS: Final = frozenset({"reconfigure", "check_health"})
_READS_BODY: Final = frozenset({"body", "form", "json", "stream"})


def command_for(deployment: Deployment[Any], url: str | None, curl: str = "curl") -> str | None:
    """A command that calls a deployment successfully; None where the code does not say how.

    Args:
        url: The URL of its route; None if it has none.
        curl: The command and the options that every request needs.
    """
    code = deployment.func_or_class
    frozen = getattr(code, "__qserve_asgi__", None)
    if frozen is not None:
        path = None if url is None else _path_of_app(frozen.app)
        return None if path is None or url is None else f"{curl} {_quoted(url.rstrip('/') + path)}"
    bases = code.__mro__ if inspect.isclass(code) else ()
    entry = next((vars(base)["__call__"] for base in bases if "__call__" in vars(base)), None) if bases else code
    if url is None or not inspect.isroutine(entry):
        return _call_command(deployment.name, code)
    return _curl_command(curl, url, entry, skip=int(inspect.isclass(code)))


def _quoted(url: str) -> str:
    return shlex.quote(url) if "?" in url else url


# Applications


def _path_of_app(app: Any) -> str | None:
    """A path that an application answers without being told anything."""
    for name in ("docs_url", "openapi_url"):
        if getattr(app, name, None):
            return str(getattr(app, name))
    routes = [route for route in getattr(app, "routes", ()) if isinstance(route, Route)]
    paths = [route.path for route in routes if "GET" in (route.methods or ()) and not _asks(route)]
    return paths[0] if paths else None


def _asks(route: Any) -> bool:
    dependant = getattr(route, "dependant", None)
    if "{" in route.path or (dependant is not None and dependant.dependencies):
        return True
    fields = [
        *(getattr(dependant, "query_params", ())),
        *(getattr(dependant, "header_params", ())),
        *(getattr(dependant, "cookie_params", ())),
    ]
    return any(field.field_info.is_required() for field in fields)


# Plain deployments over HTTP


def _curl_command(curl: str, url: str, entry: Callable[..., Any], skip: int) -> str | None:
    parameters = list(inspect.signature(entry).parameters.values())[skip:]
    required = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    if len([each for each in required if each.kind is not each.VAR_POSITIONAL]) > 1:
        return None
    if inspect.isgeneratorfunction(entry) or inspect.isasyncgenfunction(entry):
        curl += " -N"
    if not parameters:
        return f"{curl} {_quoted(url)}"
    query, body = _wants_of(entry)
    if body is None:
        return None
    if query:
        url += "?" + "&".join(f"{key}={value}" for key, value in query.items())
    if isinstance(body, Mapping):
        return f"{curl} {_quoted(url)} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"{curl} {_quoted(url)}" + (f" -d {body}" if body else "")


def _wants_of(entry: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any] | str | None]:
    """(query parameters, body) that code asks a request for; the body is "" if it asks for none, None if it is unclear
    which one it wants."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(entry)))
    except (OSError, TypeError, SyntaxError):
        return {}, ""
    numbers = {
        id(argument): name
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("int", "float")
        for name in [node.func.id]
        for argument in node.args
    }
    lists = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "split"}
    names = _names_of_json(tree)
    query: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
            continue
        key = node.slice.value
        if not isinstance(key, str):
            continue
        value = "1,2,3" if id(node) in lists else _value_named(key, numbers.get(id(node)))
        if isinstance(node.value, ast.Attribute) and node.value.attr == "query_params":
            query[key] = value
        elif _is_json(node.value) or (isinstance(node.value, ast.Name) and node.value.id in names):
            fields[key] = value
    reads = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args
    } & _READS_BODY
    if not reads:
        return query, ""
    if reads == {"body"}:
        return query, "hello"
    return query, fields if reads == {"json"} and fields else None


def _is_json(node: ast.expr) -> bool:
    if isinstance(node, ast.Await):
        node = node.value
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "json"


def _names_of_json(tree: ast.AST) -> set[str]:
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _is_json(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _value_named(key: str, number: str | None) -> Any:
    return {"int": 1, "float": 1.5}[number] if number else _WORDS.get(key, "hello")


# Deployments without a route


def _call_command(name: str, code: Callable[..., Any]) -> str | None:
    """`qserve call` with a method and arguments that fit it."""
    for method, function, skip in _entries(code):
        words = _words_for(function, skip)
        if words is not None:
            return " ".join(["qserve call", name, *([method] if method else []), *words])
    return None


def _entries(code: Callable[..., Any]) -> Iterable[tuple[str, Callable[..., Any], int]]:
    if not inspect.isclass(code):
        yield "", code, 0
        return
    own = {name: value for name, value in vars(code).items() if inspect.isfunction(value)}
    if "__call__" in own:
        yield "", own["__call__"], 1
    for name, value in own.items():
        if not name.startswith("_") and name not in _NOT_FOR_CALLERS:
            yield name, value, 1


def _words_for(function: Callable[..., Any], skip: int) -> list[str] | None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return None
    try:
        hints = get_type_hints(function)
    except Exception:
        hints = {}
    words = []
    for each in list(inspect.signature(function).parameters.values())[skip:]:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) or each.default is not each.empty:
            continue
        value = _value_for(hints.get(each.name))
        if value is None:
            return None
        word = value if isinstance(value, str) else json.dumps(value)
        words.append(shlex.quote(word if each.kind is not each.KEYWORD_ONLY else f"{each.name}={word}"))
    return words


def _value_for(hint: Any) -> Any:
    if get_origin(hint) is list and get_args(hint)[0] in _VALUES:
        return [_VALUES[get_args(hint)[0]]]
    return _VALUES.get(hint) if hint is not Request and isinstance(hint, type) else None
