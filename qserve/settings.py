"""Configuration from the environment (`QSERVE_*`); docs/configuration.md lists it for users."""

import hmac
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from qserve.broker.keys import Keys
from qserve.broker.server.address import parse
from qserve.errors import ConfigurationError
from qserve.wire.names import NAME_PATTERN
from qserve.wire.seconds import PositiveSeconds


def _in_capitals(given: Any) -> Any:
    return given.upper() if isinstance(given, str) else given


LevelName = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LogLevel = Annotated[LevelName, BeforeValidator(_in_capitals)]

MIB = 1024 * 1024
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_SPANS = tuple(f"qserve.telemetry.tracing:{where}Spans" for where in ("Client", "Gateway", "Replica", "Batch"))


@dataclass(frozen=True)
class Shown:
    """The default of a setting as docs/configuration.md says it, where that is not the value itself."""

    text: str


class Settings(BaseSettings):
    """What a process needs to find its Redis and behave; every field is an environment variable `QSERVE_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix="QSERVE_",
        env_ignore_empty=True,
        extra="ignore",
        ignored_types=(cached_property,),
        str_strip_whitespace=True,  # what was made with `echo` ends with a new line, and no header can bring that
    )

    def __init__(self, **values: Any) -> None:
        """Read the environment.

        Raises:
            ConfigurationError: A variable has a value that it cannot have.
        """
        try:
            super().__init__(**values)
        except ValidationError as exc:
            wrong = (f"QSERVE_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in exc.errors())
            raise ConfigurationError(f"{'; '.join(wrong)}. docs/configuration.md lists what can be set.") from exc

    redis_url: Annotated[str, Shown("unset: the instance on this machine")] = Field(
        default="",
        repr=False,
        description="URL of the Redis (7 or newer) or Valkey server, sentinels or cluster: [The server](#the-server).",
    )
    secret: Annotated[str, Shown("unset: messages are not signed")] = Field(
        default="",
        repr=False,
        description=(
            "Key that signs every message. Several keys may be given, separated by commas: all of them are "
            "accepted, and the first one signs. To change the key, add the new one last everywhere, then put it "
            "first everywhere, then remove the old one."
        ),
    )
    namespace: str = Field(
        default="default",
        pattern=f"^{NAME_PATTERN}$",
        description="Instances in different namespaces can share a server; they share nothing else.",
    )
    app: str = Field(
        default="",
        description="`MODULE[:NAME]` for `qserve run` and `qserve deploy` when the command line names none.",
    )
    hooks: str = Field(
        default="",
        description="Hooks to run around every call, `module:Class`, separated by commas: see [Hooks](hooks.md).",
    )
    traces: bool = Field(
        default=False,
        description="`1` makes OpenTelemetry spans of calls: see [Traces](telemetry.md#traces). Needs `qserve[otel]`.",
    )
    trace_durable: Literal["link", "child"] = Field(
        default="link",
        description=(
            "Whether what a durable call does is a trace of its own, with a `link` to that of its caller, or a `child` "
            "in that trace."
        ),
    )
    http_timeout_s: PositiveSeconds = Field(
        default=60.0,
        description="Deadline of an HTTP request whose deployment sets no `timeout_s`.",
    )
    handle_timeout_s: PositiveSeconds = Field(
        default=3600.0,
        description="Deadline of a call through a handle that sets none.",
    )
    max_value_bytes: int = Field(
        default=4096 * MIB,
        gt=0,
        description="Largest argument list, and largest result that is not streamed: [Large values](large-values.md).",
    )
    max_body_bytes: int = Field(
        default=1024 * MIB,
        gt=0,
        description="Largest HTTP body. One above `QSERVE_OUT_OF_LINE_BYTES` does not stand in queues.",
    )
    out_of_line_bytes: int = Field(
        default=256 * 1024,
        gt=0,
        description="Larger payloads do not stand in queues: [Large values](large-values.md) says where they are.",
    )
    http_header_timeout_s: PositiveSeconds = Field(
        default=10.0,
        description="A request whose headers are not complete after this time is answered with 408.",
    )
    http_body_timeout_s: PositiveSeconds = Field(
        default=30.0,
        description="A request whose body pauses for this long is answered with 408.",
    )
    http_body_bytes_per_s: int = Field(
        default=1024,
        ge=0,
        description=(
            "Slowest rate of a body: one that takes longer than `QSERVE_HTTP_BODY_TIMEOUT_S` plus the time for "
            "its bytes at this rate is answered with 408. `0` means no lower limit."
        ),
    )
    http_send_timeout_s: PositiveSeconds = Field(
        default=60.0,
        description="A client that reads nothing of its response, or of its WebSocket, for this long is disconnected.",
    )
    http_keep_alive_s: PositiveSeconds = Field(
        default=5.0,
        description="How long an idle connection may wait for its next request.",
    )
    http_max_connections: int = Field(
        default=10_000,
        gt=0,
        description="Connections that one gateway process accepts; more are answered with 503.",
    )
    http_max_connections_per_ip: Annotated[int, Shown("`0`: no limit")] = Field(
        default=0,
        ge=0,
        description=(
            "Connections from one address to one gateway process; more are answered with 429. Behind a proxy, all "
            "connections come from one address."
        ),
    )
    websocket_origins: Annotated[str, Shown("unset: pages of the gateway's own host")] = Field(
        default="",
        description="Further origins whose pages may open WebSockets, separated by commas. `*` means all.",
    )
    access_log: Annotated[Literal["off", "short", "text", "json"], Shown("`off`; `short` in `qserve run`")] = Field(
        default="off",
        description=(
            "`short`, `text` or `json` writes a line for each response to the gateway's standard output. `qserve run` "
            "writes short ones if it runs in a terminal."
        ),
    )
    api_keys: Annotated[str, Shown("unset: HTTP is open")] = Field(
        default="",
        repr=False,
        description="API keys, separated by commas: the keys themselves, or `sha256:` and their hex digests.",
    )
    api_keys_file: str = Field(
        default="",
        description="File with one key on each line, which may be followed by the deployments that it opens.",
    )
    public_url: Annotated[str, Shown("where the gateway listens")] = Field(
        default="",
        description="URL that status, logs and `Deployment.url` name: that of a published port, or of a proxy.",
    )
    admin_port: Annotated[int | None, Shown("unset: no admin listener")] = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of the gateway's admin listener for metrics, status and actions. `0` means any free port.",
    )
    admin_host: str = Field(
        default="127.0.0.1",
        description="Address of the admin listener. Any other address needs `QSERVE_ADMIN_TOKEN`.",
    )
    admin_token: Annotated[str, Shown("a random one, kept in the runtime folder")] = Field(
        default="",
        repr=False,
        description="Bearer token that the admin listener asks for.",
    )
    admin_allowed_hosts: str = Field(
        default="",
        description="Host names, besides localhost, under which the admin listener answers; separated by commas.",
    )
    console_open: bool = Field(
        default=False,
        description=(
            "Whoever can reach the [console](console.md) from this machine is an operator, without a token, and any "
            "free port will do where `QSERVE_ADMIN_PORT` is taken; `qserve run` sets it."
        ),
    )
    console_viewer_token: Annotated[str, Shown("unset: there are no viewers")] = Field(
        default="",
        repr=False,
        description="Token with which one may look at the console, but not act and not see arguments and results.",
    )
    console_label: str = Field(
        default="",
        description="What the console shows beside the namespace, such as `production`.",
    )
    console_hidden_names: str = Field(
        default="password,passwd,secret,token,api_key,authorization,cookie",
        description="The console shows no argument or field whose name contains one of these, separated by commas.",
    )
    console_user_header: str = Field(
        default="",
        description=(
            "Header in which a proxy that signs users in names them, such as `X-Forwarded-User`: see "
            "[the console](console.md#single-sign-on)."
        ),
    )
    console_proxies: str = Field(
        default="127.0.0.1,::1",
        description="Addresses of proxies whose `QSERVE_CONSOLE_USER_HEADER` is believed, separated by commas.",
    )
    console_operators: str = Field(
        default="",
        description="Users of that header who may act, separated by commas; `*` means all. The others may look.",
    )
    durability: Literal["memory", "fsync", "replica"] = Field(
        default="memory",
        description=(
            "Where Redis must have stored a [durable call](durable-calls.md) before it counts as submitted: in "
            "`memory`, on its disk (`fsync`), or in the memory of a `replica`, too."
        ),
    )
    celery_calls: Annotated[bool | None, Shown("`1` where nothing is signed, and on instances of one machine")] = Field(
        default=None,
        description=(
            "`1`: workers accept [calls from Celery clients](durable-calls.md#from-celery), which are not signed. "
            "`0`: they do not."
        ),
    )
    gpus: Annotated[str, Shown("unset: `CUDA_VISIBLE_DEVICES` of the node, or all")] = Field(
        default="",
        description="The [GPUs](gpus.md) that replicas on this machine may use, such as `0,1`.",
    )
    beat_interval_s: PositiveSeconds = Field(default=1.0, description="How often a replica says that it is alive.")
    dead_after_s: PositiveSeconds = Field(
        default=5.0,
        description=(
            "A replica that is silent for this long counts as dead for the others. A process that ends is noticed "
            "at once by its own machine."
        ),
    )
    max_loop_stall_s: PositiveSeconds = Field(
        default=30.0,
        description=(
            "A replica whose event loop stands still for this long writes its stacks to the log and is replaced."
        ),
    )
    slow_call_s: PositiveSeconds = Field(
        default=5.0,
        description=(
            "An ordinary call that runs for longer is noted among the [calls that had trouble](operations.md#calls)."
        ),
    )
    max_deliveries: int = Field(
        default=3,
        ge=1,
        description="On how many replicas a safe call may be run before it is given up.",
    )
    autorestore: bool = Field(
        default=True,
        description="Nodes, gateways and replicas put back what was deployed when the server has lost it.",
    )
    strict: bool = Field(
        default=False,
        description=(
            "After a restart or failover of the server, replicas answer unsafe calls that were queued before it "
            "with `Indeterminate` instead of running them, because the server may have forgotten that they ran."
        ),
    )
    refuse_replays: bool = Field(
        default=False,
        description=(
            "Each unsafe call is claimed in Redis before it runs, so that a signed message which somebody stores "
            "a second time runs once only, on whatever replica. This costs every unsafe call one round trip to "
            "Redis. See [Security](security.md)."
        ),
    )
    log_level: LogLevel = Field(
        default="INFO", description="Level of qserve's own logs: `DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`."
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="How each record of the log is written, in every process: see [Logs](telemetry.md#logs).",
    )
    names_output: bool = Field(
        default=False,
        description="Each line that user code prints begins with its deployment; `qserve run` sets it.",
    )
    debug: bool = Field(
        default=False,
        description="Puts tracebacks of plain deployments into HTTP bodies; `qserve run --debug` sets it.",
    )

    @property
    def hook_paths(self) -> str:
        """The hooks to run around every call: the user's, then those of traces where these are on."""
        return ",".join(filter(None, (self.hooks, *(_SPANS if self.traces else ()))))

    @cached_property
    def keys(self) -> Keys:
        """Key names of the namespace."""
        return Keys(self.namespace, parse(self.redis_url).shards if self.redis_url else 1)

    @cached_property
    def secrets(self) -> tuple[bytes, ...]:
        """Signing keys, the first one signs; each namespace has its own, so that no frame of one passes in another."""
        about = f"qserve namespace {self.namespace}".encode()
        given = (part.strip().encode() for part in self.secret.split(","))
        return tuple(hmac.digest(secret, about, "sha256") for secret in given if secret)


def at_deployment(settings: Settings, deployment: str) -> Settings:
    """The settings with which a process speaks to the shard of a deployment; the same where there are no shards."""
    return at_shard(settings, settings.keys.of(deployment).shard)


def at_shard(settings: Settings, shard: int) -> Settings:
    """The settings with which a process speaks to a shard: its keys are that shard's."""
    if shard == settings.keys.shard:
        return settings
    found = settings.model_copy()
    found.__dict__["keys"] = settings.keys.at(shard)  # as cached_property would
    return found
