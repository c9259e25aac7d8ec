"""`http_options`: where HTTP is served, and with which middlewares."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.middleware import Middleware

from qserve.deployments.loading import make_target
from qserve.settings import Shown
from qserve.wire.codec import Codec
from qserve.wire.spec import EVERY_NODE, HttpSettings, MiddlewareSpec


class Location(StrEnum):
    """Where gateways run. On one machine, EveryNode means the same as HeadOnly."""

    HEAD_ONLY = "HeadOnly"
    EVERY_NODE = EVERY_NODE
    NO_SERVER = "NoServer"


class HTTPOptions(BaseModel):
    """How `serve.start` serves HTTP."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)

    host: str | None = Field(default="127.0.0.1", description="Address to listen on. `None` means no HTTP.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on. `0` means any free port.")
    root_path: str = Field(
        default="",
        description=(
            "Prefix under which everything is served, for a reverse proxy that keeps its own prefix in the path."
        ),
    )
    root_url: Annotated[str, Shown("made of host and port")] = Field(
        default="", description="What `Deployment.url` begins with."
    )
    middlewares: list[Middleware] = Field(
        default=[],
        description=(
            "`starlette.middleware.Middleware` objects, the first one outermost. They run in the gateway, which "
            "imports them."
        ),
    )
    location: Location | None = Field(
        default=Location.HEAD_ONLY,
        description=(
            "`HeadOnly`: one gateway. `EveryNode`: one gateway beside every node that is not started with "
            "`--no-gateway`, on the node's `--host` and `--port`; the gateways of one machine share the port. "
            "`NoServer` or `None`: no HTTP."
        ),
    )

    num_cpus: float = Field(default=0, description="Accepted because Ray Serve has it, and without effect.")

    @field_validator("middlewares", mode="before")
    @classmethod
    def _classes_too(cls, value: Any) -> Any:
        if not isinstance(value, Sequence):
            return value
        return [Middleware(cast(Any, item)) if isinstance(item, type) else item for item in value]

    @model_validator(mode="before")
    @classmethod
    def _no_host_no_server(cls, values: Any) -> Any:
        if isinstance(values, dict) and (
            values.get("location") == "FixedNumber"
            or values.keys() & {"fixed_number_replicas", "fixed_number_selection_seed"}
        ):
            raise ValueError(
                "There is no location FixedNumber. Use HeadOnly for one gateway (`qserve run --gateway-workers` makes "
                "it several processes), or EveryNode for one beside every node."
            )
        if isinstance(values, dict) and (values.get("host", "") is None or values.get("location", "") is None):
            return values | {"location": Location.NO_SERVER}
        return values

    @property
    def serves(self) -> bool:
        """Whether HTTP is served at all."""
        return self.location != Location.NO_SERVER

    def settings(self, codec: Codec) -> HttpSettings:
        """The options that every gateway needs.

        Raises:
            ConfigurationError: A middleware cannot be sent to the gateway.
            ValueNotSerializable: An argument of a middleware cannot be sent to the gateway.
        """
        return HttpSettings(
            root_path=self.root_path,
            root_url=self.root_url,
            middlewares=tuple(_middleware_spec(middleware, codec) for middleware in self.middlewares),
            location=str(self.location),
        )

    def address(self) -> dict[str, str | int | None]:
        """The options for the process that starts a gateway."""
        return {"host": self.host, "port": self.port, "location": str(self.location)}


def _middleware_spec(middleware: Middleware, codec: Codec) -> MiddlewareSpec:
    name = getattr(middleware.cls, "__name__", str(middleware.cls))
    return MiddlewareSpec(
        target=make_target(middleware.cls, allow_pickle=codec.allow_pickle),
        arguments=codec.pack_call(tuple(middleware.args), dict(middleware.kwargs), f"the middleware {name}"),
    )
