"""The sections of a config file, as pydantic models: they check a file, and the schema for editors is made of them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from qserve.config_file.logging_config import LoggingConfig
from qserve.wire.autoscaling import AUTO
from qserve.wire.names import is_name
from qserve.wire.options import DECLARED, RAY_NAMES, DeclaredOption, check_environment
from qserve.wire.ray_names import REFUSED, WITHOUT_EFFECT, refuse_unavailable
from qserve.wire.seconds import PositiveSeconds

_NOT_IN_FILES = frozenset({"name", "prev_version", "route_prefix", "init_args"})
"""Options of `serve.deployment` that a file says elsewhere, or not at all."""
_WITHOUT_EFFECT = ("logging_config", "max_surge_percent", "rolling_update_percentage", "max_replicas_per_node")


class Section(BaseModel):
    """What all sections have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked(name: str) -> AfterValidator:
    """The check of an option of a deployment, which its declaration has."""
    check = next(each.option.check for each in DECLARED if name in each.names)
    assert check is not None

    def validate(value: Any) -> Any:
        try:
            check(name, value)
        except TypeError as exc:
            raise ValueError(str(exc)) from None
        return value

    return AfterValidator(validate)


def _described(text: str) -> str:
    """A text of the documentation as editors show it: links are their words."""
    return text.partition(": see [")[0].replace("`", "")


def _option_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for each in DECLARED:
        if each.field in _NOT_IN_FILES:
            continue
        for name in filter(None, (each.names[0], each.option.ray_name)):
            fields[name] = (Annotated[_type_of(each), Field(description=_described(each.option.text))], None)
    for name in _WITHOUT_EFFECT:
        fields[name] = (Annotated[Any, Field(description=f"Without effect: {WITHOUT_EFFECT[name]}.")], None)
    return fields


def _type_of(option: DeclaredOption) -> Any:
    name = option.names[0]
    if name == "num_replicas":
        return option.type | Literal["auto"] | None
    if name == "max_queued_requests":
        return option.type | Literal[-1] | None
    given = option.option.given or option.type
    return (Annotated[given, _checked(name)] if option.option.check is not None else given) | None


_OptionFields: Any = create_model("_OptionFields", **_option_fields())


class DeploymentSection(_OptionFields, Section):  # type: ignore[misc]
    """One deployment of an application: what is given here is used instead of what the code says."""

    name: str = Field(description="The name of the deployment within its application.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_and_complete(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        refuse_unavailable(name for name in values if values[name] is not None and name in REFUSED)
        for ray_name, name in RAY_NAMES.items():
            if values.get(ray_name) is not None and values.get(name) is not None:
                raise ValueError(f"{name} is given twice, also as {ray_name}.")
        scaling = values.get("autoscaling_config")
        if values.get("num_replicas") == "auto" and isinstance(scaling, Mapping | None):
            return {**values, "autoscaling_config": {**AUTO, **(scaling or {})}}
        if values.get("num_replicas") is not None and scaling is not None:
            raise ValueError(
                "num_replicas and autoscaling_config exclude each other: give min_replicas and max_replicas."
            )
        return values

    def options(self) -> dict[str, Any]:
        """What is given, as keyword arguments for `Deployment.options`."""
        return {name: getattr(self, name) for name in self.model_fields_set - {"name"}}


class RuntimeEnvSection(BaseModel):
    """The environment of an application. Only `env_vars` has an effect."""

    model_config = ConfigDict(extra="allow", frozen=True)

    env_vars: dict[str, str] = Field(
        default={}, description="Environment variables of every replica, set before its code is imported."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_code(cls, values: Any) -> Any:
        for name in ("working_dir", "py_modules"):
            if isinstance(values, Mapping) and values.get(name):
                raise ValueError(
                    f"{name} is not available in qserve: code is not fetched. Put it where the nodes run, in their "
                    "image for example, and leave this line out; `--app-dir FOLDER` imports from another folder."
                )
        return values

    @field_validator("env_vars")
    @classmethod
    def _check_env_vars(cls, env_vars: dict[str, str]) -> dict[str, str]:
        check_environment(env_vars)
        return env_vars


class ApplicationSection(Section):
    """One application."""

    name: str = Field(default="default", description="The name of the application, unique within the file.")
    route_prefix: str | None = Field(
        default="/", description="The path under which it is served, unique within the file; null: not over HTTP."
    )
    import_path: str = Field(
        description="Where the application is: module:name, of an application, a deployment, or a function that "
        "builds an application from `args`."
    )
    args: dict[str, Any] = Field(default={}, description="The argument of a function that builds the application.")
    runtime_env: RuntimeEnvSection = Field(default=RuntimeEnvSection(), description="The environment of its replicas.")
    deployments: tuple[DeploymentSection, ...] = Field(
        default=(), description="Options of its deployments; those of a deployment that is not listed are in the code."
    )
    logging_config: Any = Field(default=None, description=f"Without effect: {WITHOUT_EFFECT['logging_config']}.")
    external_scaler_enabled: bool = Field(
        default=False, description=f"Without effect: {WITHOUT_EFFECT['external_scaler_enabled']}."
    )
    autoscaling_policy: Any = Field(default=None, description=f"Without effect: {WITHOUT_EFFECT['policy']}.")

    _check_route = field_validator("route_prefix")(_checked("route_prefix").func)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not is_name(name):
            raise ValueError(f"{name!r} is not possible, it takes 1 to 63 letters, digits, '_', '.' and '-'.")
        return name

    @field_validator("deployments")
    @classmethod
    def _check_deployments(cls, deployments: tuple[DeploymentSection, ...]) -> tuple[DeploymentSection, ...]:
        _refuse_twice("the deployment", [each.name for each in deployments])
        return deployments


class HTTPSection(Section):
    """How HTTP is served."""

    host: str | None = Field(default=None, description="Address to listen on, for `qserve run`. Default: 127.0.0.1.")
    port: int | None = Field(default=None, ge=0, le=65535, description="Port, for `qserve run`. Default: 8000.")
    root_path: str = Field(default="", description="Prefix that a reverse proxy keeps in the path.")
    request_timeout_s: PositiveSeconds | None = Field(
        default=None, description="The deadline of requests, for `qserve run`: QSERVE_HTTP_TIMEOUT_S."
    )
    keep_alive_timeout_s: PositiveSeconds | None = Field(
        default=None, description="How long idle connections stay, for `qserve run`: QSERVE_HTTP_KEEP_ALIVE_S."
    )
    ssl_certfile: str | None = Field(default=None, description="Certificate chain, for `qserve run`.")
    ssl_keyfile: str | None = Field(default=None, description="The key of the certificate, for `qserve run`.")
    ssl_ca_certs: str | None = Field(
        default=None, description="Clients have to show a certificate of one of these authorities, for `qserve run`."
    )


class ConfigFile(Section):
    """What an instance should serve. An application that is deployed from a file and no longer in it is deleted."""

    proxy_location: Literal["HeadOnly", "EveryNode", "Disabled"] | None = Field(
        default=None, description="Where gateways run: one, one beside every node, or none."
    )
    http_options: HTTPSection = Field(default=HTTPSection(), description="How HTTP is served.")
    grpc_options: dict[str, Any] = Field(default={}, description="Without effect: there is no gRPC.")
    logging_config: LoggingConfig = Field(default=LoggingConfig(), description="How processes log.")
    target_capacity: float | None = Field(default=None, description="Without effect: all replicas are started.")
    applications: tuple[ApplicationSection, ...] = Field(description="The applications; none: all of them go.")

    @field_validator("applications")
    @classmethod
    def _check_applications(cls, applications: tuple[ApplicationSection, ...]) -> tuple[ApplicationSection, ...]:
        _refuse_twice("the application", [each.name for each in applications])
        _refuse_twice("the route_prefix", [each.route_prefix for each in applications if each.route_prefix is not None])
        return applications


def _refuse_twice(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is there twice.")
