"""How the number of replicas follows the load: as users give it, and as the spec holds it."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    create_model,
    model_validator,
)

from qserve.wire.ray_names import warn_once
from qserve.wire.seconds import NonNegativeSeconds, PositiveSeconds


class Autoscaling(msgspec.Struct, frozen=True):
    """How the number of replicas follows the load.

    Attributes:
        min_replicas: There are never fewer; with 0, there are none while nobody calls, and a call starts the first.
        max_replicas: There are never more.
        target_ongoing_requests: The number of calls, queued and running, for each replica.
        upscale_delay_s: How long more replicas must have been needed before they are started.
        downscale_delay_s: How long fewer replicas must have been enough before idle ones leave.
        max_wait_s: When a call has waited for this long, one more replica is started, however few calls there are.
        initial_replicas: How many there are at first, until the load has said otherwise; None: `min_replicas`.
        downscale_to_zero_delay_s: How long there must have been no call before the last replica leaves, where there may
            be none; None: `downscale_delay_s`.
    """

    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 2.0
    upscale_delay_s: NonNegativeSeconds = 30.0
    downscale_delay_s: NonNegativeSeconds = 600.0
    max_wait_s: PositiveSeconds = 10.0
    initial_replicas: PositiveInt | None = None
    downscale_to_zero_delay_s: NonNegativeSeconds | None = None

    @property
    def sleeps(self) -> bool:
        """Whether there may be no replica at all."""
        return self.min_replicas == 0


def _fields_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: (field.type, field.default) for field in msgspec.structs.fields(struct)}


_AutoscalingFields: Any = create_model("_AutoscalingFields", **_fields_of(Autoscaling))


OTHER_NAMES: Final = {"target_num_ongoing_requests_per_replica": "target_ongoing_requests"}
IGNORED_NAMES: Final = frozenset(
    {"metrics_interval_s", "look_back_period_s", "aggregation_function"}
    | {"upscaling_factor", "downscaling_factor"}
    | {f"{direction}smoothing_factor" for direction in ("", "upscale_", "downscale_")}
)
"""How Ray Serve averages what replicas report; here the queue itself says what there is to do."""

AUTO: Final = {"min_replicas": 1, "max_replicas": 100}
"""What `num_replicas="auto"` means."""


class AutoscalingPolicy(BaseModel):
    """A policy of Ray Serve, which is taken, and has no effect: the number of replicas follows the queue."""

    model_config = ConfigDict(frozen=True, extra="allow")


class AutoscalingContext:
    """What policies of Ray Serve are called with: only a name to annotate them with, since none is called here."""


class AutoscalingConfig(_AutoscalingFields):  # type: ignore[misc]
    """`Autoscaling` as users give it, and checked. Its name is that of Ray Serve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _take_names_of_ray(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        taken = {OTHER_NAMES.get(name, name): value for name, value in values.items()}
        if len(taken) < len(values):
            raise ValueError("target_ongoing_requests was given twice, also under its older name.")
        if taken.pop("policy", None) is not None:
            warn_once("policy")
        return {name: value for name, value in taken.items() if name not in IGNORED_NAMES}

    @model_validator(mode="after")
    def _check_order(self) -> "AutoscalingConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}).")
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(f"initial_replicas ({initial}) is not between min_replicas and max_replicas.")
        return self
