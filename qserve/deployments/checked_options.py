"""The options that users give: checking them, completing them with defaults, and changing them."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ConfigDict, create_model

from qserve.wire.options import DECLARED, Default

_DEFAULTS: Final[Mapping[str, Any]] = {name: option.default for option in DECLARED for name in option.names}

_CONFIG_FIELDS: Final[Any] = {
    each.names[0]: (each.option.given or each.type, each.default) for each in DECLARED if each.option.check is None
}
_ConfigFields: Any = create_model("_ConfigFields", **_CONFIG_FIELDS)


class DeploymentConfig(_ConfigFields):  # type: ignore[misc]
    """The options of a deployment that pydantic checks by their types, also when one is assigned."""

    model_config = ConfigDict(validate_assignment=True, extra="forbid")


_UNDERSCORED: Final = frozenset(
    {"_autoscaling_config", "_graceful_shutdown_timeout_s", "_graceful_shutdown_wait_loop_s"}
    | {"_health_check_period_s", "_health_check_timeout_s"}
)
"""Options that Ray Serve 1.x called experimental."""


def known_options(options: Mapping[str, Any], function: str) -> dict[str, Any]:
    """The options under the names that they have here.

    Raises:
        TypeError: There is no such option, or it was given under both of its names.
    """
    known = {name.removeprefix("_") if name in _UNDERSCORED else name: value for name, value in options.items()}
    if len(known) < len(options):
        twice = sorted(name for name in options if name in _UNDERSCORED and name.removeprefix("_") in options)
        raise TypeError(f"{function}() got options twice, with and without an underscore: {', '.join(twice)}")
    unknown = known.keys() - _DEFAULTS.keys()
    if unknown:
        raise TypeError(f"{function}() got unknown options: {', '.join(sorted(unknown))}")
    return known


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given: None means "not given" for all but `route_prefix`.

    Raises:
        ValueError: Both a fixed number of replicas and autoscaling were given.
    """
    if options.get("num_replicas") is not None and options.get("autoscaling_config") is not None:
        raise ValueError("num_replicas and autoscaling_config exclude each other: give min_replicas and max_replicas.")
    return {
        name: value
        for name, value in options.items()
        if (not isinstance(value, Default) if name == "route_prefix" else value is not None)
    }


def complete_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """All options, checked, with the defaults of those that were not given.

    Raises:
        TypeError, ValueError: The value of an option is not possible; pydantic's ValidationError is a ValueError.
    """
    options = {**_DEFAULTS, **given}
    for each in DECLARED:
        if each.option.check is not None:
            for name in each.names:
                each.option.check(name, options[name])
    config = config_of(options)
    return {
        **options,
        **{name: getattr(config, name) for name in DeploymentConfig.model_fields},
        "init_args": tuple(options["init_args"] or ()),
        "init_kwargs": dict(options["init_kwargs"] or {}),
        "ray_actor_options": dict(options["ray_actor_options"] or {}),
    }


def changed_options(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options after a change.

    `num_replicas` ends autoscaling, and `autoscaling_config` begins it. `prev_version` is a condition of one deploy and
    does not stay.

    Raises:
        TypeError, ValueError: As `given_options` and `complete_options`.
    """
    changes = given_options(given)
    if "num_replicas" in changes:
        changes["autoscaling_config"] = None
    elif "autoscaling_config" in changes:
        changes["num_replicas"] = _DEFAULTS["num_replicas"]
    return complete_options({**options, "prev_version": None, **changes})


def config_of(options: Mapping[str, Any]) -> DeploymentConfig:
    """The config that these options make."""
    return DeploymentConfig(**{name: options[name] for name in DeploymentConfig.model_fields})
