"""`http_options`: where HTTP is served, and with which middlewares."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.middleware import Middleware

from qserve.deployments.loading import make_target
from qserve.settings import Shown
from qserve.wire.codec import Codec
from qserve.wire.seconds import PositiveSeconds
from qserve.wire.spec import EVERY_NODE, HttpSettings, MiddlewareSpec


class Location(StrEnum):
    """Where gateways run. On one machine, EveryNode means the same as HeadOnly."""

    HEAD_ONLY = "HeadOnly"
    EVERY_NODE = EVERY_NODE
    NO_SERVER = "NoServer"


class ProxyLocation(StrEnum):
    """`Location` as Ray Serve 2.x has it, for `serve.start(proxy_location=...)`."""

    Disabled = "Disabled"
    HeadOnly = "HeadOnly"
    EveryNode = EVERY_NODE


_OF_TLS = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")


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

    request_timeout_s: PositiveSeconds | None = Field(
        default=None, description="The deadline of a request whose deployment has none; else `QSERVE_HTTP_TIMEOUT_S`."
    )
    keep_alive_timeout_s: PositiveSeconds | None = Field(
        default=None, description="How long an idle connection may stay; else `QSERVE_HTTP_KEEP_ALIVE_S`."
    )
    ssl_certfile: str | None = Field(default=None, description="Certificate chain. With it, the gateway serves HTTPS.")
    ssl_keyfile: str | None = Field(
        default=None, description="The key of the certificate, if it is not in the same file."
    )
    ssl_ca_certs: str | None = Field(
        default=None, description="Clients have to show a certificate of one of these authorities."
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

    def of_processes(self) -> dict[str, str | int | float | None]:
        """The options that a gateway is started with."""
        names = ("host", "port", "request_timeout_s", "keep_alive_timeout_s", *_OF_TLS)
        return {**{name: getattr(self, name) for name in names}, "location": str(self.location)}

    def gateway_arguments(self) -> tuple[str, ...]:
        """Those that a gateway is told on its command line."""
        given = {name: getattr(self, name) for name in _OF_TLS}
        return tuple(f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None)

    def environment(self) -> dict[str, str]:
        """Those that all processes find in their environment."""
        return {
            variable: str(value)
            for variable, value in (
                ("QSERVE_HTTP_TIMEOUT_S", self.request_timeout_s),
                ("QSERVE_HTTP_KEEP_ALIVE_S", self.keep_alive_timeout_s),
            )
            if value is not None
        }


def _middleware_spec(middleware: Middleware, codec: Codec) -> MiddlewareSpec:
    name = getattr(middleware.cls, "__name__", str(middleware.cls))
    return MiddlewareSpec(
        target=make_target(middleware.cls, allow_pickle=codec.allow_pickle),
        arguments=codec.pack_call(tuple(middleware.args), dict(middleware.kwargs), f"the middleware {name}"),
    )
