"""The options of a deployment. `DeploymentOptions` declares each of them once.

From the declaration follow the default, the check and its error, the field of the spec that is stored in Redis, the
field of the hash in which Lua scripts look up limits, and the row of the table in docs/configuration.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Final, Literal, TypedDict, get_type_hints

import msgspec
from pydantic import BaseModel, ConfigDict, PositiveInt

from qserve.wire.autoscaling import Autoscaling, AutoscalingConfig
from qserve.wire.names import is_name
from qserve.wire.seconds import NonNegativeSeconds, PositiveSeconds


class Default(Enum):
    """Stands for "not given" where None is a value of its own."""

    VALUE = "default"


@dataclass(frozen=True)
class Option:
    """What is declared of an option besides its type and its default. It is part of the `Annotated` type of the field.

    Attributes:
        text: The meaning of the option, for the table in docs/configuration.md.
        names: The names under which users give it, if they are not the name of the field.
        ray_name: The name that Ray Serve has for it, which is taken too; "" if it has none of its own.
        given: The type in which users give it, if the spec holds it in another form, which `Deployment.to_spec` makes.
            With several names, a type for each.
        default: The value of an option that was not given, if it is not the default of the field.
        shown: The default as the table shows it, if that is not the value itself.
        check: Called with the name and the value; raises if the value is not possible. None: pydantic checks the type.
        makes_version: Whether a change of it is a new version, with new replicas, if `qserve deploy` makes the version.
            If not, the change is made in the running replicas.
        script_field: The field of the deployment's hash in Redis where Lua scripts find it; "" if none needs it.
    """

    text: str
    names: tuple[str, ...] = ()
    ray_name: str = ""
    given: Any = None
    default: Any = msgspec.NODEFAULT
    shown: str = ""
    check: Callable[[str, Any], None] | None = None
    makes_version: bool = True
    script_field: str = ""


# Checks, with the errors that users of Ray Serve 1.x know


def _is_a(kind: type | tuple[type, ...], said: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be {said}.")

    return check


def _check_name(name: str, value: Any) -> None:
    _is_a(str, "a string")(name, value)
    if not is_name(value):
        raise ValueError(
            f"name {value!r} is not possible, it takes 1 to 63 letters, digits, '_', '.' and '-'. "
            "Give another one with name=."
        )


def _check_route_prefix(name: str, value: Any) -> None:
    if value is None or isinstance(value, Default):
        return
    _is_a(str, "a string")(name, value)
    if not value.startswith("/"):
        raise ValueError("route_prefix must start with '/'.")
    if value != "/" and value.endswith("/"):
        raise ValueError("route_prefix must not end with '/' unless it's the root.")
    if "{" in value or "}" in value:
        raise ValueError("route_prefix may not contain wildcards.")


def _check_actor_options(name: str, value: Any) -> None:
    _is_a(dict, "a dict")(name, value)
    for key in ("name", "namespace", "lifetime", "max_restarts", "placement_group"):
        if key in (value or {}):
            raise ValueError(f"Specifying {key!r} in ray_actor_options is not allowed.")

    environment = ((value or {}).get("runtime_env") or {}).get("env_vars") or {}
    _is_a(dict, "a dict")("env_vars of ray_actor_options['runtime_env']", environment)
    for variable, text in environment.items():
        if not isinstance(variable, str) or not isinstance(text, str):
            raise TypeError(
                f"env_vars of ray_actor_options['runtime_env'] must be strings, and {variable!r}: {text!r} is not. Put "
                f'it between quotes: "{variable}": "{text}"'
            )
    check_environment(environment)


def check_environment(variables: Mapping[str, str]) -> None:
    """Raise ValueError for a variable that no process can have."""
    for name, text in variables.items():
        if not name or "=" in name or "\0" in name + text:
            raise ValueError(
                f"an environment variable cannot be called {name!r} and be {text!r}: its name is not empty and has no "
                "'=', and neither has a zero byte."
            )


def _check_gpus(_name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (value > 1 and value % 1):
        raise ValueError(f"num_gpus must be a whole number or a fraction below 1, not {value!r}.")


def _check_init_arguments(name: str, value: Any) -> None:
    check = _is_a((tuple, list), "a tuple") if name == "init_args" else _is_a(dict, "a dict")
    check(name, value)


class Backpressure(msgspec.Struct, frozen=True):
    """How HTTP clients are told that a queue is full.

    Attributes:
        status_code: 503, or 429.
        retry_after_s: What the header `Retry-After` says; None: how long it takes at the pace of the queue.
    """

    status_code: int = 503
    retry_after_s: float | None = None


class BackpressureConfig(BaseModel):
    """`Backpressure` as users give it, and checked. Its name is that of Ray Serve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status_code: Literal[503, 429] = 503
    retry_after_s: NonNegativeSeconds | None = None


# The declaration


class DeploymentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """All options of a deployment, in the form in which its spec holds them.

    To add an option, declare it here, and add its line to `GivenOptions` below, which type checkers and editors read.
    Then write the code that obeys it, and a test. `make tables` writes its row in docs/configuration.md. So a limit on
    calls per second touches three files besides that page: this one, the Lua script that enforces it, and the test.
    """

    name: Annotated[
        str,
        Option(
            "The name of the deployment and of its queue: 1 to 63 of the characters `[A-Za-z0-9_.-]`.",
            default=None,
            shown="the name of the class or function",
            check=_check_name,
        ),
    ]
    version: Annotated[
        str | None,
        Option(
            "Replicas of the same version are kept, and those of another are replaced. Without a version every "
            "`deploy()` in a script replaces them; `qserve deploy` uses a hash of the code.",
            check=_is_a(str, "a string"),
            makes_version=False,
        ),
    ] = None
    prev_version: Annotated[
        str | None,
        Option("`deploy()` fails unless this version is deployed.", check=_is_a(str, "a string"), makes_version=False),
    ] = None
    num_replicas: Annotated[
        PositiveInt,
        Option(
            "The number of replicas in an instance that `qserve run` or `serve.start()` has started. In others, each "
            'node runs as many as its `--replicas-per-node` says. `"auto"`: 1 to 100, by autoscaling.',
            makes_version=False,
        ),
    ] = 1
    autoscaling: Annotated[
        Autoscaling | None,
        Option(
            "From `min_replicas` to `max_replicas` replicas instead of `num_replicas`, according to how much there is "
            "to do: see [scaling.md](scaling.md#autoscaling).",
            names=("autoscaling_config",),
            given=AutoscalingConfig | None,
            makes_version=False,
        ),
    ] = None
    route_prefix: Annotated[
        str | None,
        Option(
            "The path under which it is served over HTTP; `None`: only handles reach it. The longest prefix wins.",
            given=str | Default | None,
            default=Default.VALUE,
            shown="`/<name>`",
            check=_check_route_prefix,
            script_field="route",
            makes_version=False,
        ),
    ] = None
    max_concurrent_queries: Annotated[
        PositiveInt,
        Option("The number of calls that a replica takes on at once.", ray_name="max_ongoing_requests"),
    ] = 100
    max_queued_requests: Annotated[
        PositiveInt,
        Option(
            "The number of calls that may be queued and running in all; more are refused (503 with `Retry-After`, or "
            "`BackPressureError`). `-1`: no limit.",
            script_field="max_queued",
        ),
    ] = 10_000
    backpressure: Annotated[
        Backpressure | None,
        Option(
            'What HTTP clients get while the queue is full: `{"status_code": 503 or 429, "retry_after_s": seconds}`.',
            names=("backpressure_config",),
            given=BackpressureConfig | None,
            shown="503, and `Retry-After` as the queue moves",
            makes_version=False,
        ),
    ] = None
    max_threads: Annotated[
        PositiveInt,
        Option(
            "The number of `def` methods that one replica runs at once, endpoints of its application among them. With "
            "one, they need no locks."
        ),
    ] = 1
    read_only_arguments: Annotated[
        bool,
        Option(
            "Large arrays among the arguments arrive as read-only views of the caller's memory where both are on one "
            "host, which spares a copy: see [large values](large-values.md#read-only-views).",
        ),
    ] = False
    timeout_s: Annotated[
        PositiveSeconds | None,
        Option(
            "The deadline of an HTTP request; one that was not started by then never runs. Handles take theirs from "
            "`handle.options(timeout_s=...)`.",
            shown="none: `QSERVE_HTTP_TIMEOUT_S`",
        ),
    ] = None
    idempotent: Annotated[
        bool,
        Option(
            "Calls may run again after their replica has died. Otherwise only GET, HEAD, OPTIONS, PUT and DELETE "
            "requests and requests with an `Idempotency-Key` may.",
            script_field="idempotent",
        ),
    ] = False
    user_config: Annotated[
        bytes | None,
        Option(
            "What the `reconfigure(config)` method of the class gets after the constructor has run, and again when "
            "only this option changes.",
            given=Any,
            makes_version=False,
        ),
    ] = None
    init_args: Annotated[
        bytes,
        Option(
            "Arguments of the constructor. Those of `.deploy(...)` replace them.",
            names=("init_args", "init_kwargs"),
            given=(Sequence[Any], Mapping[str, Any]),
            default=None,
            shown="`()`, `{}`",
            check=_check_init_arguments,
        ),
    ] = b""
    surge: Annotated[
        bool,
        Option(
            "A redeploy constructs each new replica before an old one leaves. `False` is for models of which only one "
            "fits into memory."
        ),
    ] = True
    graceful_shutdown_timeout_s: Annotated[
        NonNegativeSeconds,
        Option(
            "How long a replica that leaves may take to finish its calls, and then the shutdown hooks of its "
            "application and its `__del__`. Then its process is killed. A new `user_config` waits as long for the "
            "calls that run."
        ),
    ] = 20.0
    graceful_shutdown_wait_loop_s: Annotated[
        PositiveSeconds, Option("Accepted because Ray Serve has it, and without effect: qserve does not poll.")
    ] = 2.0
    initialization_timeout_s: Annotated[
        PositiveSeconds, Option("How long a constructor or `reconfigure` may take. One that takes longer has failed.")
    ] = 600.0
    max_constructor_retry_count: Annotated[
        PositiveInt,
        Option(
            "How many constructors may fail before a deploy that has brought up no replica is given up; at most three "
            "for each replica.",
            makes_version=False,
        ),
    ] = 100
    health_check_period_s: Annotated[
        PositiveSeconds,
        Option(
            "How often the method `check_health` of the class is called, if it has one. A replica in which it raises "
            "three times in a row is replaced.",
            makes_version=False,
        ),
    ] = 10.0
    health_check_timeout_s: Annotated[
        PositiveSeconds,
        Option(
            "How long `check_health` may take. A replica in which it takes longer is ended at once, and replaced.",
            makes_version=False,
        ),
    ] = 30.0
    http_method_header: Annotated[
        bool, Option("The header `X-Serve-Call-Method` may name a public method to call instead of `__call__`.")
    ] = True
    num_gpus: Annotated[
        float,
        Option(
            "How many [GPUs](gpus.md) each replica gets to itself, or which part of one. It waits until there is room.",
            check=_check_gpus,
        ),
    ] = 0
    ray_actor_options: Annotated[
        bytes,
        Option(
            '`{"runtime_env": {"env_vars": {...}}}` sets variables before the code is imported, and `num_gpus` is the '
            "option of that name. The rest is recorded, and without effect.",
            given=Mapping[str, Any],
            default=None,
            shown="none",
            check=_check_actor_options,
        ),
    ] = b""


class GivenOptions(TypedDict, total=False):
    """The keyword arguments of `serve.deployment` and `Deployment.options`; `DeploymentOptions` describes each."""

    name: str | None
    version: str | None
    prev_version: str | None
    num_replicas: int | Literal["auto"] | None
    autoscaling_config: AutoscalingConfig | Mapping[str, Any] | None
    route_prefix: str | Default | None
    max_concurrent_queries: int | None
    max_ongoing_requests: int | None
    max_queued_requests: int | None
    backpressure_config: BackpressureConfig | Mapping[str, Any] | None
    max_threads: int | None
    read_only_arguments: bool | None
    timeout_s: float | None
    idempotent: bool | None
    user_config: Any
    init_args: Sequence[Any] | None
    init_kwargs: Mapping[str, Any] | None
    surge: bool | None
    graceful_shutdown_timeout_s: float | None
    graceful_shutdown_wait_loop_s: float | None
    initialization_timeout_s: float | None
    max_constructor_retry_count: int | None
    health_check_period_s: float | None
    health_check_timeout_s: float | None
    http_method_header: bool | None
    num_gpus: float | None
    ray_actor_options: Mapping[str, Any] | None


# What follows from it


@dataclass(frozen=True)
class DeclaredOption:
    """One field of `DeploymentOptions`.

    Attributes:
        field: Its name in the spec.
        type: Its type in the spec, with the constraints that pydantic checks.
        names: The names under which users give it.
        default: Its value if it was not given.
        option: The rest of its declaration.
    """

    field: str
    type: Any
    names: tuple[str, ...]
    default: Any
    option: Option


def _declared() -> tuple[DeclaredOption, ...]:
    hints = get_type_hints(DeploymentOptions, include_extras=True)
    found = []
    for field in msgspec.structs.fields(DeploymentOptions):
        option: Option = next(each for each in hints[field.name].__metadata__ if isinstance(each, Option))
        default = field.default if option.default is msgspec.NODEFAULT else option.default
        found.append(DeclaredOption(field.name, hints[field.name], option.names or (field.name,), default, option))
    return tuple(found)


DECLARED: Final = _declared()
RAY_NAMES: Final = {each.option.ray_name: each.names[0] for each in DECLARED if each.option.ray_name}
"""Names of Ray Serve for options that are called otherwise here."""


def script_fields(options: DeploymentOptions) -> tuple[str | int, ...]:
    """The options that Lua scripts look up, as names and values for HSET: None becomes "", booleans become 1 and 0."""
    values = {each.option.script_field: getattr(options, each.field) for each in DECLARED if each.option.script_field}
    pairs = (
        (name, "" if value is None else int(value) if isinstance(value, bool) else value)
        for name, value in values.items()
    )
    return tuple(part for pair in pairs for part in pair)
