"""The options that users give: checking them, completing them with defaults, and changing them."""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, create_model

from qserve.deployments.option_errors import told_in_words
from qserve.wire.autoscaling import AUTO, AutoscalingConfig
from qserve.wire.options import DECLARED, RAY_NAMES, Default
from qserve.wire.ray_names import WITHOUT_EFFECT, refuse_unavailable, warn_once

_DEFAULTS: Final[Mapping[str, Any]] = {name: option.default for option in DECLARED for name in option.names}

_CONFIG_FIELDS: Final[Any] = {
    each.names[0]: (each.option.given or each.type, each.default) for each in DECLARED if each.option.check is None
}
_ConfigFields: Any = create_model("_ConfigFields", **_CONFIG_FIELDS)


class DeploymentConfig(_ConfigFields):  # type: ignore[misc]
    """The options of a deployment that pydantic checks by their types, also when one is assigned."""

    model_config = ConfigDict(validate_assignment=True, extra="forbid")


_NO_LIMIT: Final = 2**31 - 1
"""What `max_queued_requests=-1` becomes."""


def known_options(options: Mapping[str, Any], function: str) -> dict[str, Any]:
    """The options under the names and in the form that they have here.

    Names of Ray Serve are taken, those of 1.x with an underscore too; what has no effect here is warned of once.

    Raises:
        TypeError: There is no such option, or it was given under both of its names.
        ValueError: It stands for something that qserve does not have, or has an impossible value.
    """
    known: dict[str, Any] = {}
    for given, value in options.items():
        plain = given.removeprefix("_")
        name = RAY_NAMES.get(plain, plain)
        if name in known:
            both = " and ".join(
                sorted(each for each in options if RAY_NAMES.get(p := each.removeprefix("_"), p) == name)
            )
            raise TypeError(f"{function}() got options twice, under different names: {both}")
        known[name] = value
        if name != plain and value is not None:
            with told_in_words((), {name: given}):  # before it is only known under the other name
                DeploymentConfig(**{name: value})
    refuse_unavailable(name for name, value in known.items() if value is not None)
    for name in known.keys() & WITHOUT_EFFECT.keys():
        if known.pop(name) is not None:
            warn_once(name)
    if unknown := sorted(known.keys() - _DEFAULTS.keys()):
        close = difflib.get_close_matches(unknown[0], [*_DEFAULTS, *RAY_NAMES], n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{function}() got unknown options: {', '.join(unknown)}{hint}")
    if known.get("num_replicas") == "auto":
        scaling = known.get("autoscaling_config") or {}
        scaling = scaling.model_dump(exclude_unset=True) if isinstance(scaling, AutoscalingConfig) else scaling
        scaling = {**AUTO, **scaling} if isinstance(scaling, Mapping) else scaling
        known |= {"num_replicas": None, "autoscaling_config": scaling}
    if known.get("max_queued_requests") == -1:
        known["max_queued_requests"] = _NO_LIMIT
    _take_actor_options(known)
    return known


def _take_actor_options(known: dict[str, Any]) -> None:
    actor_options = known.get("ray_actor_options")
    if not isinstance(actor_options, Mapping):
        return
    if (gpus := actor_options.get("num_gpus")) is not None:
        known.setdefault("num_gpus", gpus)
    environment = actor_options.get("runtime_env")
    if isinstance(environment, Mapping) and environment.keys() - {"env_vars"}:
        warn_once("runtime_env")


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
        TypeError, ValueError: The value of an option is not possible.
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


def other_than_default(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of all options that are not their defaults, in the form in which they can be given."""
    changed = {name: value for name, value in options.items() if value not in (_DEFAULTS[name], (), {})}
    if changed.get("max_queued_requests") == _NO_LIMIT:
        changed["max_queued_requests"] = -1
    if changed.get("autoscaling_config") is not None:
        changed.pop("num_replicas", None)
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in changed.items()}


def config_of(options: Mapping[str, Any]) -> DeploymentConfig:
    """The config that these options make."""
    with told_in_words([*_DEFAULTS, *AutoscalingConfig.model_fields]):
        return DeploymentConfig(**{name: options[name] for name in DeploymentConfig.model_fields})
