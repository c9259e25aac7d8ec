"""What can be said of a deployment, its defaults, and the checks, whose errors users of Ray Serve 1.x know."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from qserve.broker.keys import is_name

_FOREIGN_ACTOR_OPTIONS = ("name", "namespace", "lifetime", "max_restarts", "placement_group")


class Default(Enum):
    """Stands for "not given" where None is a value of its own."""

    VALUE = "default"


class AutoscalingConfig(BaseModel):
    """How many replicas there are to be, by how much there is to do; named as in Ray Serve.

    Attributes:
        min_replicas: Never fewer. At least 1: a deployment without replicas would let its first caller wait for one.
        max_replicas: Never more.
        target_ongoing_requests: Calls, queued and running, that one replica is for.
        upscale_delay_s: How long more replicas must have been wanted before they are started.
        downscale_delay_s: How long fewer must have been enough before idle ones leave.
        max_wait_s: A call that has waited for so long asks for one more replica, whatever the count of calls says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 2.0
    upscale_delay_s: NonNegativeFloat = 30.0
    downscale_delay_s: NonNegativeFloat = 600.0
    max_wait_s: PositiveFloat = 10.0

    @model_validator(mode="before")
    @classmethod
    def _refuse_none(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("min_replicas") == 0:
            raise ValueError("min_replicas must be at least 1: qserve keeps a replica, so that no call waits for one.")
        return values

    @model_validator(mode="after")
    def _check_order(self) -> "AutoscalingConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}).")
        return self


class DeploymentConfig(BaseModel):
    """What of a deployment can change without new replicas; checked on every assignment.

    Attributes:
        num_replicas: Processes that serve it, where replicas are not counted per node.
        autoscaling_config: How many instead, by how much there is to do.
        max_concurrent_queries: Calls one replica runs at once.
        max_queued_requests: Calls, queued and running, beyond which callers are turned away.
        user_config: Handed to `reconfigure`, at once and whenever it changes.
        idempotent: Calls may be run again after their replica died.
        max_threads: `def` methods that one replica runs at once.
        timeout_s: Deadline of HTTP calls; None: what the gateway says.
        surge: Whether a new replica is constructed before its predecessor leaves.
        http_method_header: Whether `X-Serve-Call-Method` picks another public method over HTTP.
        graceful_shutdown_timeout_s: Time a leaving replica has for the calls it runs.
        graceful_shutdown_wait_loop_s: How often it looks whether they have ended.
        initialization_timeout_s: Time a constructor has.
    """

    model_config = ConfigDict(validate_assignment=True, extra="forbid")

    num_replicas: PositiveInt = 1
    autoscaling_config: AutoscalingConfig | None = None
    max_concurrent_queries: PositiveInt = 100
    max_queued_requests: PositiveInt = 10_000
    user_config: Any = None
    idempotent: bool = False
    max_threads: PositiveInt = 1
    timeout_s: PositiveFloat | None = None
    surge: bool = True
    http_method_header: bool = True
    graceful_shutdown_timeout_s: NonNegativeFloat = 20.0
    graceful_shutdown_wait_loop_s: PositiveFloat = 2.0
    initialization_timeout_s: PositiveFloat = 600.0


OPTION_DEFAULTS: Final[Mapping[str, Any]] = {
    **{key: field.default for key, field in DeploymentConfig.model_fields.items()},
    "name": None,
    "version": None,
    "prev_version": None,
    "init_args": None,
    "init_kwargs": None,
    "route_prefix": Default.VALUE,
    "ray_actor_options": None,
}


def check_options(options: Mapping[str, Any]) -> None:
    """Check all options of a deployment.

    Raises:
        TypeError, ValueError: One of them is not what it should be; pydantic's ValidationError is a ValueError.
    """
    _check_type(options, "name", str, "a string")
    _check_type(options, "version", str, "a string")
    _check_type(options, "prev_version", str, "a string")
    _check_type(options, "init_args", (tuple, list), "a tuple")
    _check_type(options, "init_kwargs", dict, "a dict")
    _check_type(options, "ray_actor_options", dict, "a dict")
    if not is_name(options["name"]):
        raise ValueError(
            f"name {options['name']!r} is not possible, it takes 1 to 63 letters, digits, '_', '.' and '-'. "
            "Give another one with name=."
        )
    _check_route_prefix(options["route_prefix"])
    for key in _FOREIGN_ACTOR_OPTIONS:
        if key in (options["ray_actor_options"] or {}):
            raise ValueError(f"Specifying {key!r} in ray_actor_options is not allowed.")
    DeploymentConfig(**{key: options[key] for key in DeploymentConfig.model_fields})


def check_replica_options(given: Mapping[str, Any]) -> None:
    """Check what was said of the number of replicas in one place, where the later place wins.

    Raises:
        ValueError: It is fixed and scaled at once.
    """
    if given.get("num_replicas") is not None and given.get("autoscaling_config") is not None:
        raise ValueError("num_replicas and autoscaling_config exclude each other: give min_replicas and max_replicas.")


def _check_type(options: Mapping[str, Any], key: str, kind: type | tuple[type, ...], said: str) -> None:
    if options[key] is not None and not isinstance(options[key], kind):
        raise TypeError(f"{key} must be {said}.")


def _check_route_prefix(route_prefix: object) -> None:
    if route_prefix is None or isinstance(route_prefix, Default):
        return
    if not isinstance(route_prefix, str):
        raise TypeError("route_prefix must be a string.")
    if not route_prefix.startswith("/"):
        raise ValueError("route_prefix must start with '/'.")
    if route_prefix != "/" and route_prefix.endswith("/"):
        raise ValueError("route_prefix must not end with '/' unless it's the root.")
    if "{" in route_prefix or "}" in route_prefix:
        raise ValueError("route_prefix may not contain wildcards.")
