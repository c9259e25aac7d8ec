"""Configuration from the environment (`QSERVE_*`); docs/configuration.md lists it for users."""

import hmac
from functools import cached_property
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from qserve.broker.keys import Keys
from qserve.wire.names import NAME_PATTERN

MIB = 1024 * 1024


class Settings(BaseSettings):
    """What a process needs to find its Redis and behave; every field is an environment variable `QSERVE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="QSERVE_", extra="ignore", ignored_types=(cached_property,))

    redis_url: str = Field(default="", repr=False)
    """What `qserve.broker.address` reads; empty: the local instance found by its file."""
    secret: str = Field(default="", repr=False)
    """Signs every frame; several, separated by commas, are accepted and the first one signs."""
    namespace: str = Field(default="default", pattern=f"^{NAME_PATTERN}$")
    app: str = ""
    """MODULE[:NAME] of the application to deploy, for containers."""
    hooks: str = ""
    """Import paths of `qserve.hooks`, separated by commas."""
    http_timeout_s: float = Field(default=60.0, gt=0)
    handle_timeout_s: float = Field(default=3600.0, gt=0)
    max_value_bytes: int = Field(default=16 * MIB, gt=0)
    """Largest argument list or result that is not streamed."""
    max_body_bytes: int = Field(default=1024 * MIB, gt=0)
    """Largest HTTP body; one of more than `out_of_line_bytes` is streamed to its replica."""
    out_of_line_bytes: int = Field(default=256 * 1024, gt=0)
    """Payloads above this size travel under their own key."""
    http_header_timeout_s: float = Field(default=10.0, gt=0)
    http_body_timeout_s: float = Field(default=30.0, gt=0)
    http_body_bytes_per_s: int = Field(default=1024, ge=0)
    """A request's body that comes slower, after `http_body_timeout_s`, is given up; 0: it may."""
    http_send_timeout_s: float = Field(default=60.0, gt=0)
    """A client that takes nothing of its response for so long is given up."""
    http_keep_alive_s: float = Field(default=5.0, gt=0)
    http_max_connections: int = Field(default=10_000, gt=0)
    http_max_connections_per_ip: int = Field(default=0, ge=0)
    """0: no limit; behind a proxy all connections come from one address."""
    websocket_origins: str = ""
    """Origins whose pages may open WebSockets beside our own, comma-separated; "*": all."""
    access_log: Literal["off", "text", "json"] = "off"
    api_keys: str = Field(default="", repr=False)
    """Keys, or `sha256:` digests of them, separated by commas; with one, HTTP is only for whoever brings one."""
    api_keys_file: str = ""
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    admin_token: str = Field(default="", repr=False)
    admin_allowed_hosts: str = ""
    durability: Literal["memory", "fsync", "replica"] = "memory"
    """Where Redis has a durable call when it is said to be submitted."""
    celery_calls: bool | None = None
    """Take calls from Celery clients, which sign nothing; None: where nothing is signed, and on a local instance."""
    beat_interval_s: float = Field(default=1.0, gt=0)
    dead_after_s: float = Field(default=5.0, gt=0)
    max_loop_stall_s: float = Field(default=30.0, gt=0)
    max_deliveries: int = Field(default=3, ge=1)
    autorestore: bool = True
    """Put back what was deployed when the server has lost it."""
    strict: bool = False
    """Unsafe calls of before a restart or failover of the server are answered with `Indeterminate`, not run."""
    refuse_replays: bool = False
    """Claim each unsafe call in Redis before it runs, where frames are signed, so that none runs twice."""
    log_level: str = "INFO"
    debug: bool = False
    """Put tracebacks of plain deployments into HTTP bodies."""

    @cached_property
    def keys(self) -> Keys:
        """Key names of the namespace."""
        return Keys(self.namespace)

    @cached_property
    def secrets(self) -> tuple[bytes, ...]:
        """Signing keys, the first one signs; each namespace has its own, so that no frame of one passes in another."""
        about = f"qserve namespace {self.namespace}".encode()
        given = (part.strip().encode() for part in self.secret.split(","))
        return tuple(hmac.digest(secret, about, "sha256") for secret in given if secret)
