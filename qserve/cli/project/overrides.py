"""What a command line says of an application in place of its code: options of `run`, `dev` and `deploy`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar, cast

import click

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Overrides:
    """What the command line says.

    Attributes:
        replicas: `num_replicas` of every deployment.
        name: The name of the application.
        route_prefix: The path of the application.
        arguments: For a function that builds an application.
    """

    replicas: int | None = None
    name: str | None = None
    route_prefix: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_of_one_application(self) -> bool:
        """Whether they are meant for a single application."""
        return self.name is not None or self.route_prefix is not None

    def as_arguments(self) -> list[str]:
        """As they are written on a command line."""
        options = {"--replicas": self.replicas, "--name": self.name, "--route-prefix": self.route_prefix}
        written = [f"{option}={value}" for option, value in options.items() if value is not None]
        return [*(f"{name}={value}" for name, value in self.arguments.items()), *written]


def override_options(command: Command) -> Command:
    """The options, which the command gets as `overrides`; to be put below `app_argument`."""

    @wraps(command)
    def packed(
        *,
        replicas: int | None,
        name: str | None,
        route_prefix: str | None,
        arguments: Mapping[str, str],
        **others: Any,
    ) -> Any:
        return command(overrides=Overrides(replicas, name, route_prefix, arguments), **others)

    decorated: Any = packed
    for option in (
        click.option("--route-prefix", metavar="PATH", help="Path of the application, instead of what the code says."),
        click.option("--name", help="Name of the application. Default: default."),
        click.option(
            "--replicas",
            type=click.IntRange(min=1),
            help="Number of replicas of every deployment, instead of what the code says.",
        ),
    ):
        decorated = option(decorated)
    return cast(Command, decorated)
