"""From an application to its deployments: each has a name of its own, and handles in the place of applications."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from qserve.calls.handle import get_handle
from qserve.deployments.binding import Application, Membership
from qserve.deployments.deployment import Deployment
from qserve.wire.names import is_name
from qserve.wire.options import Default

DEFAULT_NAME: Final = "default"
"""The application whose deployments are called as they are; those of others have its name before theirs."""


@dataclass(frozen=True)
class RunTarget:
    """One application for `serve.run_many`; the attributes are the arguments of `serve.run`."""

    target: Application[Any]
    name: str = DEFAULT_NAME
    route_prefix: str | Default | None = Default.VALUE
    logging_config: object = None


@dataclass(frozen=True)
class Graph:
    """The deployments of an application, ready to be deployed.

    Attributes:
        name: The name of the application.
        deployments: The ones that are used before the ones that use them; so the last one is the root.
    """

    name: str
    deployments: tuple[Deployment[Any], ...]

    @property
    def root(self) -> Deployment[Any]:
        """The deployment that serves the application over HTTP."""
        return self.deployments[-1]


def name_in(application: str, deployment: str) -> str:
    """The name of a deployment of an application, within the instance."""
    return deployment if application in ("", DEFAULT_NAME) else f"{application}.{deployment}"


def own_name(application: str, full_name: str) -> str:
    """The reverse of `name_in`."""
    return full_name.removeprefix(name_in(application, ""))


def make_graph(
    application: Application[Any], name: str = DEFAULT_NAME, route_prefix: str | Default | None = Default.VALUE
) -> Graph:
    """The deployments of an application.

    Args:
        name: The name of the application.
        route_prefix: The path of the root, which alone is served over HTTP; not given: that of its deployment, or "/".

    Raises:
        ValueError: The application or one of its deployments cannot have that name.
    """
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(
            f"The application's name {name!r} is not possible, it takes 1 to 63 letters, digits, '_', '.' and '-'."
        )
    return Graph(name, tuple(_Builder(name, route_prefix).build(application)))


def parts_of(application: Application[Any]) -> Iterator[Application[Any]]:
    """The applications that it uses, those that these use, and so on."""
    for used in _applications_in((application.args, dict(application.kwargs))):
        yield used
        yield from parts_of(used)


class _Builder:
    """Goes through a graph once, from the leaves to the root."""

    def __init__(self, name: str, route_prefix: str | Default | None) -> None:
        self._name = name
        self._route_prefix = route_prefix
        self._names: dict[Application[Any], str] = {}

    def build(self, root: Application[Any]) -> Iterator[Deployment[Any]]:
        yield from self._visit(root, self._route_of(root), is_root=True)

    def _visit(
        self, application: Application[Any], route_prefix: str | None = None, *, is_root: bool = False
    ) -> Iterator[Deployment[Any]]:
        if application in self._names:
            return
        for used in _applications_in((application.args, dict(application.kwargs))):
            yield from self._visit(used)
        self._names[application] = name = self._free_name(application.deployment.name)
        changes: dict[str, Any] = {"name": name, "route_prefix": route_prefix}
        if application.args or application.kwargs:
            changes["init_args"] = self._with_handles(application.args)
            changes["init_kwargs"] = self._with_handles(dict(application.kwargs))
        yield application.deployment.options(**changes).as_member(Membership(self._name, is_root))

    def _route_of(self, root: Application[Any]) -> str | None:
        given = root.deployment.given_route_prefix
        if not isinstance(self._route_prefix, Default):
            return self._route_prefix
        return "/" if isinstance(given, Default) else given

    def _free_name(self, wanted: str) -> str:
        name, taken, number = name_in(self._name, wanted), set(self._names.values()), 0
        while name in taken:
            number += 1
            name = name_in(self._name, f"{wanted}_{number}")
        if not is_name(name):
            raise ValueError(
                f"The name {name!r} is too long, with the application's {self._name!r} before it: 63 at most."
            )
        return name

    def _with_handles(self, value: Any) -> Any:
        if isinstance(value, Application):
            return get_handle(self._names[value])
        if isinstance(value, dict):
            return {key: self._with_handles(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            parts = [self._with_handles(each) for each in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value


def _applications_in(value: Any) -> Iterator[Application[Any]]:
    if isinstance(value, Application):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _applications_in(each)
