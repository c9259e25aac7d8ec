"""The options of a deployment, as attributes to read."""

from collections.abc import Mapping
from typing import Any

from qserve.deployments.checked_options import DeploymentConfig, config_of, other_than_default
from qserve.wire.autoscaling import AutoscalingConfig
from qserve.wire.options import Default


class ReadableOptions:
    """What can be read of a deployment; `Deployment.options` makes a copy with others."""

    _options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Unique name within the instance."""
        return str(self._options["name"])

    @property
    def version(self) -> str | None:
        """A deploy with another version replaces the replicas; with None, every deploy does."""
        version: str | None = self._options["version"]
        return version

    @property
    def prev_version(self) -> str | None:
        """The version that must be deployed for `deploy` to succeed."""
        prev_version: str | None = self._options["prev_version"]
        return prev_version

    @property
    def num_replicas(self) -> int:
        """The number of replicas, each a process."""
        return int(self._options["num_replicas"])

    @property
    def autoscaling_config(self) -> AutoscalingConfig | None:
        """How the number of replicas follows the load; None: it is `num_replicas`."""
        autoscaling_config: AutoscalingConfig | None = self._options["autoscaling_config"]
        return autoscaling_config

    @property
    def user_config(self) -> Any:
        """The argument of `reconfigure`."""
        return self._options["user_config"]

    @property
    def max_concurrent_queries(self) -> int:
        """Calls that one replica takes on at once."""
        return int(self._options["max_concurrent_queries"])

    @property
    def max_ongoing_requests(self) -> int:
        """What Ray Serve 2.x calls `max_concurrent_queries`."""
        return self.max_concurrent_queries

    @property
    def config(self) -> DeploymentConfig:
        """A copy of the options that are plain numbers and flags, of `autoscaling_config` and of `user_config`."""
        return config_of(self._options)

    @property
    def changed_options(self) -> dict[str, Any]:
        """The options that are not their defaults, as they could be given to `serve.deployment`."""
        return other_than_default(self._options)

    @property
    def route_prefix(self) -> str | None:
        """The path under which it is served; None: it is not served over HTTP."""
        prefix = self._options["route_prefix"]
        return f"/{self.name}" if isinstance(prefix, Default) else prefix

    @property
    def given_route_prefix(self) -> str | Default | None:
        """`route_prefix` as it was given."""
        prefix: str | Default | None = self._options["route_prefix"]
        return prefix

    @property
    def ray_actor_options(self) -> dict[str, Any]:
        """Environment variables of each replica; the rest is recorded, and without effect."""
        return dict(self._options["ray_actor_options"])

    @property
    def init_args(self) -> tuple[Any, ...]:
        """Positional arguments of the constructor."""
        return tuple(self._options["init_args"])

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        return dict(self._options["init_kwargs"])
