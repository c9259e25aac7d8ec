"""`@serve.deployment`: the description of a class or function that replicas serve under a name."""

import inspect
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import msgspec

from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle, get_handle
from qserve.deployments.loading import Deployable, importing, is_importing, load_target, make_target
from qserve.deployments.options import (
    OPTION_DEFAULTS,
    AutoscalingConfig,
    Default,
    DeploymentConfig,
    check_options,
    check_replica_options,
)
from qserve.errors import NoInstanceError
from qserve.wire.codec import Codec
from qserve.wire.spec import Autoscaling, DeploymentSpec, Target

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_NO_INSTANCE = (
    "There is no instance running here. Call `serve.start(detached=True)` or `serve.run(...)`, "
    "or set QSERVE_REDIS_URL to reach one."
)


class Instance(Protocol):
    """What deploying needs of a running instance."""

    def deploy(
        self, deployment: "Deployment[Any]", args: tuple[Any, ...], kwargs: dict[str, Any], blocking: bool
    ) -> Any:
        """Make the deployment the desired state, with these init args, and wait until it is reached."""

    def delete(self, name: str) -> None:
        """Take the deployment down."""

    def url_of(self, route_prefix: str) -> str | None:
        """URL of a route."""


class _Driver:
    """The one thing this module is told: how to find the instance. Set when `qserve.serve` is imported."""

    find_instance: Callable[[], Instance] | None = None


def set_instance_provider(find: Callable[[], Instance]) -> None:
    """Tell deployments how to find the instance; `find` raises NoInstanceError where there is none."""
    _Driver.find_instance = find


def _instance() -> Instance:
    if _Driver.find_instance is None:
        raise NoInstanceError(_NO_INSTANCE)
    return _Driver.find_instance()


class Deployment(Deployable, Generic[T_co]):
    """A class or function, and how it is to be served. Made by `@serve.deployment`; immutable, `options` copies."""

    _name: str
    _code: Callable[..., Any] | None
    _target: Target | None
    _config: DeploymentConfig
    _version: str | None
    _prev_version: str | None
    _init_args: tuple[Any, ...]
    _init_kwargs: dict[str, Any]
    _route_prefix: str | Default | None
    _ray_actor_options: dict[str, Any]

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("The Deployment constructor should not be called directly. Use `@serve.deployment` instead.")

    @classmethod
    def _create(
        cls, code: Callable[..., Any] | None, target: Target | None, options: Mapping[str, Any]
    ) -> "Deployment[Any]":
        """A deployment from all its options, checked."""
        check_options(options)
        made = object.__new__(cls)
        made._code = code
        made._target = target
        made._name = options["name"]
        made._version = options["version"]
        made._prev_version = options["prev_version"]
        made._init_args = tuple(options["init_args"] or ())
        made._init_kwargs = dict(options["init_kwargs"] or {})
        made._route_prefix = options["route_prefix"]
        made._ray_actor_options = dict(options["ray_actor_options"] or {})
        made._config = DeploymentConfig(**{key: options[key] for key in DeploymentConfig.model_fields})
        return made

    @property
    def name(self) -> str:
        """Unique name within the instance."""
        return self._name

    @property
    def func_or_class(self) -> Callable[..., Any]:
        """The user's code; imported only now where the deployment came from the state."""
        if self._code is None:
            assert self._target is not None
            code = load_target(self._target)
            assert callable(code)
            self._code = code
        return self._code

    @property
    def version(self) -> str | None:
        """Replicas are replaced when it changes; None: on every deploy."""
        return self._version

    @property
    def prev_version(self) -> str | None:
        """The version that must be deployed for `deploy` to go ahead."""
        return self._prev_version

    @property
    def num_replicas(self) -> int:
        """Target number of replicas."""
        return self._config.num_replicas

    @property
    def autoscaling_config(self) -> AutoscalingConfig | None:
        """How many replicas instead, by how much there is to do; None: always `num_replicas`."""
        return self._config.autoscaling_config

    @property
    def user_config(self) -> Any:
        """What `reconfigure` gets."""
        return self._config.user_config

    @property
    def max_concurrent_queries(self) -> int:
        """Calls one replica runs at once."""
        return self._config.max_concurrent_queries

    @property
    def config(self) -> DeploymentConfig:
        """A copy of the settings that change without new replicas."""
        return self._config.model_copy()

    @property
    def route_prefix(self) -> str | None:
        """HTTP path prefix; None: not served over HTTP."""
        return f"/{self._name}" if isinstance(self._route_prefix, Default) else self._route_prefix

    @property
    def ray_actor_options(self) -> dict[str, Any]:
        """Accepted and recorded for compatibility; without effect."""
        return dict(self._ray_actor_options)

    @property
    def init_args(self) -> tuple[Any, ...]:
        """Positional arguments of the constructor."""
        return self._init_args

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        return dict(self._init_kwargs)

    @property
    def url(self) -> str | None:
        """Full URL, None when not served over HTTP.

        Raises:
            NoInstanceError: No instance is running.
        """
        return None if self.route_prefix is None else _instance().url_of(self.route_prefix)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise RuntimeError("Deployments cannot be constructed directly. Use `deployment.deploy() instead.`")

    def deploy(self, *init_args: Any, _blocking: bool = True, **init_kwargs: Any) -> Any:
        """Deploy or update; returns when all replicas are at this version. While qserve imports code it does nothing.

        When somebody deploys the same name meanwhile, theirs is rolled out, and this returns with a warning in the log.

        Args:
            init_args, init_kwargs: Win over those of the decorator, for this call only.

        Raises:
            ValueError: The route is taken, prev_version does not match, or init args for a function.
            RuntimeError: The constructor or `reconfigure` keeps failing; the previous version serves again.
            NoInstanceError: No instance is running.
        """
        if is_importing():
            logger.debug("Importing is not deploying: deploy() of %r does nothing", self._name)
            return None
        args, kwargs = (init_args, init_kwargs) if init_args or init_kwargs else (self._init_args, self._init_kwargs)
        self._check_init_args(args, kwargs)
        return _instance().deploy(self, tuple(args), dict(kwargs), _blocking)

    def delete(self) -> None:
        """Take the deployment down; calls already sent complete. Returns when it is gone; twice is harmless.

        Raises:
            NoInstanceError: No instance is running.
        """
        if is_importing():
            logger.debug("Importing is not deploying: delete() of %r does nothing", self._name)
            return
        _instance().delete(self._name)

    @overload
    def get_handle(self, sync: Literal[True] = True) -> DeploymentHandle[T_co]: ...
    @overload
    def get_handle(self, sync: Literal[False]) -> AsyncDeploymentHandle[T_co]: ...
    @overload
    def get_handle(self, sync: bool) -> DeploymentHandle[T_co] | AsyncDeploymentHandle[T_co]: ...
    def get_handle(self, sync: bool = True) -> DeploymentHandle[T_co] | AsyncDeploymentHandle[T_co]:
        """The handle to call it from Python; it need not be deployed yet, calls wait for replicas.

        Args:
            sync: False gives a handle for code on an event loop: `ref = await handle.remote()`.
        """
        return get_handle(self._name, sync=sync)

    def options(
        self,
        func_or_class: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        version: str | None = None,
        prev_version: str | None = None,
        num_replicas: int | None = None,
        autoscaling_config: AutoscalingConfig | Mapping[str, Any] | None = None,
        init_args: Sequence[Any] | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
        route_prefix: str | Default | None = Default.VALUE,
        ray_actor_options: Mapping[str, Any] | None = None,
        user_config: Any = None,
        max_concurrent_queries: int | None = None,
        max_queued_requests: int | None = None,
        idempotent: bool | None = None,
        max_threads: int | None = None,
        timeout_s: float | None = None,
        surge: bool | None = None,
        http_method_header: bool | None = None,
        graceful_shutdown_timeout_s: float | None = None,
        graceful_shutdown_wait_loop_s: float | None = None,
        initialization_timeout_s: float | None = None,
    ) -> "Deployment[T_co]":
        """A copy with other options; what is not given, or None, stays. None disables `route_prefix`.

        `prev_version` is a condition on one deploy and not carried over. `num_replicas` ends autoscaling, and
        `autoscaling_config` begins it.
        """
        given = locals().copy()
        del given["self"], given["func_or_class"]
        changes = {key: value for key, value in given.items() if value is not None}
        changes["prev_version"] = prev_version
        changes["route_prefix"] = self._route_prefix if isinstance(route_prefix, Default) else route_prefix
        check_replica_options(given)
        if num_replicas is not None:
            changes["autoscaling_config"] = None
        elif autoscaling_config is not None:
            changes["num_replicas"] = OPTION_DEFAULTS["num_replicas"]
        code, target = (self._code, self._target) if func_or_class is None else (func_or_class, None)
        return Deployment._create(code, target, {**self._options(), **changes})

    def to_spec(
        self,
        codec: Codec,
        *,
        init_args: tuple[Any, ...] | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> DeploymentSpec:
        """What is written to the state, as a new revision; `rollout` keeps what must stay of the one before.

        Args:
            init_args, init_kwargs: Of this deploy; both None: the decorator's.

        Raises:
            ValueError: Init args for a function.
            ConfigurationError: The code cannot travel to other processes.
            ValueNotSerializable: An init arg or the user_config cannot.
        """
        if init_args is None and init_kwargs is None:
            init_args, init_kwargs = self._init_args, self._init_kwargs
        args, kwargs = init_args or (), init_kwargs or {}
        self._check_init_args(args, kwargs)
        config, name, code, actor_options = self._config, self._name, self.func_or_class, self._ray_actor_options
        user_config, scaling = config.user_config, config.autoscaling_config
        if user_config is not None:
            user_config = codec.pack(user_config, f"user_config of {name!r}")
        return DeploymentSpec(
            name=name,
            target=self._target or make_target(code, allow_pickle=codec.allow_pickle),
            revision=uuid.uuid4().hex,
            version=self._version,
            prev_version=self._prev_version,
            route_prefix=self.route_prefix,
            init_args=codec.pack_call(args, kwargs, f"the constructor of {name!r}"),
            user_config=user_config,
            ray_actor_options=codec.pack(actor_options, f"ray_actor_options of {name!r}") if actor_options else b"",
            is_class=inspect.isclass(code),
            is_ingress=hasattr(code, "__qserve_asgi__"),
            deployed_at=time.time(),
            autoscaling=None if scaling is None else Autoscaling(**scaling.model_dump()),
            **config.model_dump(exclude={"user_config", "autoscaling_config"}),
        )

    @classmethod
    def from_spec(cls, spec: DeploymentSpec, codec: Codec) -> "Deployment[Any]":
        """The deployment that was deployed with this spec; its code is imported only when asked for."""
        with importing():  # unpacking may import modules of the user's
            args, kwargs = codec.unpack_call(spec.init_args) if spec.init_args else ((), {})
            user_config = None if spec.user_config is None else codec.unpack(spec.user_config)
            actor_options = codec.unpack(spec.ray_actor_options) if spec.ray_actor_options else {}
        options = {key: getattr(spec, key, None) for key in DeploymentConfig.model_fields}
        options |= {key: getattr(spec, key) for key in ("name", "version", "prev_version", "route_prefix")}
        options |= {"init_args": tuple(args), "init_kwargs": kwargs}
        options |= {"user_config": user_config, "ray_actor_options": actor_options}
        options["autoscaling_config"] = spec.autoscaling and msgspec.to_builtins(spec.autoscaling)
        return cls._create(None, spec.target, options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Deployment):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((self._name, self._version))

    def __repr__(self) -> str:
        return f"Deployment(name={self._name!r}, version={self._version!r}, route_prefix={self.route_prefix!r})"

    def _identity(self) -> tuple[Any, ...]:
        return self._name, self._version, self._config, self._init_args, self._init_kwargs, self.route_prefix

    def _options(self) -> dict[str, Any]:
        return {
            **{key: getattr(self._config, key) for key in DeploymentConfig.model_fields},
            "name": self._name,
            "version": self._version,
            "init_args": self._init_args,
            "init_kwargs": self._init_kwargs,
            "ray_actor_options": self._ray_actor_options,
        }

    def _check_init_args(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if (args or kwargs) and not inspect.isclass(self.func_or_class):
            given = "init_args" if args else "init_kwargs"
            raise ValueError(f"{given} not supported for function deployments.")


if TYPE_CHECKING:

    class DeployedClass(type, Deployment[Any]):
        """What a decorated class is to mypy, by way of `qserve.mypy_plugin`: a class, and a deployment of it."""

        @overload
        def get_handle(cls: type[T], sync: Literal[True] = True) -> DeploymentHandle[T]: ...
        @overload
        def get_handle(cls: type[T], sync: Literal[False]) -> AsyncDeploymentHandle[T]: ...
        @overload
        def get_handle(cls: type[T], sync: bool) -> DeploymentHandle[T] | AsyncDeploymentHandle[T]: ...
        def get_handle(cls: type[T], sync: bool = True) -> Any: ...


class DeploymentDecorator(Protocol):
    """What `@serve.deployment(...)` gives: turns a class or function into a Deployment."""

    # A class is a callable too; the first overload takes it.
    @overload
    def __call__(self, func_or_class: type[T], /) -> Deployment[T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, func_or_class: Callable[P, R], /) -> Deployment[Callable[P, R]]: ...


@overload
def deployment(func_or_class: type[T], /) -> Deployment[T]: ...  # type: ignore[overload-overlap]
@overload
def deployment(func_or_class: Callable[P, R], /) -> Deployment[Callable[P, R]]: ...
@overload
def deployment(
    func_or_class: str | None = None,
    /,
    *,
    name: str | None = None,
    version: str | None = None,
    prev_version: str | None = None,
    num_replicas: int | None = None,
    autoscaling_config: AutoscalingConfig | Mapping[str, Any] | None = None,
    init_args: Sequence[Any] | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    route_prefix: str | Default | None = Default.VALUE,
    ray_actor_options: Mapping[str, Any] | None = None,
    user_config: Any = None,
    max_concurrent_queries: int | None = None,
    max_queued_requests: int | None = None,
    idempotent: bool | None = None,
    max_threads: int | None = None,
    timeout_s: float | None = None,
    surge: bool | None = None,
    http_method_header: bool | None = None,
    graceful_shutdown_timeout_s: float | None = None,
    graceful_shutdown_wait_loop_s: float | None = None,
    initialization_timeout_s: float | None = None,
) -> DeploymentDecorator: ...
def deployment(func_or_class: Any = None, /, **options: Any) -> Any:
    """Make a class or function a deployment; bare, with `()`, or with options.

    Args:
        name: Letters, digits, "_", "." and "-"; default: the name of the class or function.
        version: Replicas are replaced when it changes; None: on every deploy.
        prev_version: Deploy only if this version is deployed now.
        num_replicas: Replicas, each a process of its own. Default: 1.
        autoscaling_config: How many instead, by how much there is to do: `min_replicas` (1), `max_replicas`,
            `target_ongoing_requests` (2), `upscale_delay_s` (30), `downscale_delay_s` (600), `max_wait_s` (10).
        init_args, init_kwargs: Arguments of the constructor.
        route_prefix: HTTP path prefix; default "/<name>", None: not served over HTTP.
        ray_actor_options: Accepted and recorded; without effect.
        user_config: Handed to the `reconfigure` method, also when it changes later.
        max_concurrent_queries: Calls one replica runs at once. Default: 100.
        max_queued_requests: Queued and running calls beyond which callers are turned away. Default: 10,000.
        idempotent: Calls may be run again after their replica died. Default: False.
        max_threads: `def` methods that one replica runs at once. Default: 1.
        timeout_s: Deadline of HTTP calls; default: the gateway's.
        surge: Construct new replicas before old ones leave; False for models that fit into memory once. Default: True.
        http_method_header: Whether `X-Serve-Call-Method` reaches other public methods. Default: True.
        graceful_shutdown_timeout_s, graceful_shutdown_wait_loop_s, initialization_timeout_s: 20, 2 and 600 seconds.

    Raises:
        TypeError, ValueError: An option is not what it should be; pydantic's ValidationError is a ValueError.
    """
    unknown = options.keys() - OPTION_DEFAULTS.keys()
    if unknown:
        raise TypeError(f"serve.deployment() got unknown options: {', '.join(sorted(unknown))}")
    given = {key: value for key, value in options.items() if value is not None or key == "route_prefix"}
    if isinstance(func_or_class, str):
        given.setdefault("name", func_or_class)
    check_replica_options(given)
    check_options({**OPTION_DEFAULTS, "name": "unnamed", **given})

    def decorate(code: Callable[..., Any]) -> Deployment[Any]:
        if isinstance(code, Deployable) or not callable(code):
            raise TypeError(f"@serve.deployment expects a class or a function, not {code!r}.")
        name = given.get("name") or getattr(code, "__name__", type(code).__name__)
        return Deployment._create(code, None, {**OPTION_DEFAULTS, **given, "name": name})

    return decorate(func_or_class) if callable(func_or_class) else decorate
