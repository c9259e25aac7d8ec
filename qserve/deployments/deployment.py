"""`@serve.deployment`: the description of a class or function that replicas serve under a name."""

import inspect
import logging
import time
import uuid
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, Unpack, overload

import msgspec
from starlette.applications import Starlette
from starlette.routing import Router
from typing_extensions import TypeVar

from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle, get_handle
from qserve.deployments.binding import ALONE, Application, Membership
from qserve.deployments.checked_options import changed_options, complete_options, given_options, known_options
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.loading import Deployable, importing, is_importing, make_target
from qserve.deployments.readable_options import ReadableOptions
from qserve.user_code.method_names import method_names
from qserve.user_code.source_files import source_digests
from qserve.wire.autoscaling import Autoscaling
from qserve.wire.codec import Codec
from qserve.wire.options import DECLARED, Backpressure, Default, GivenOptions
from qserve.wire.spec import DeploymentSpec, Target

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True, default=Any)


class Deployment(ReadableOptions, Deployable, Generic[T_co]):
    """A class or function and how it is served. Made by `@serve.deployment`; it never changes: `options` copies it."""

    _membership: Membership

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("The Deployment constructor should not be called directly. Use `@serve.deployment` instead.")

    @property
    def url(self) -> str | None:
        """The full URL; None if it is not served over HTTP.

        Raises:
            NoInstanceError: No instance is running.
        """
        return None if self.route_prefix is None else THIS_PROCESS.current().url_of(self.route_prefix)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise RuntimeError("Deployments cannot be constructed directly. Use `deployment.deploy() instead.`")

    def deploy(self, *init_args: Any, _blocking: bool = True, **init_kwargs: Any) -> Any:
        """Deploy or update, and return when all replicas are at this version. Does nothing while qserve imports code.

        When another process deploys the same name meanwhile, its deploy wins, and this one returns after a warning in
        the log.

        Args:
            init_args, init_kwargs: Arguments of the constructor, instead of those of the decorator, for this deploy.

        Raises:
            ValueError: The route belongs to another deployment, `prev_version` is not the version that is deployed, or
                a function was given arguments of a constructor.
            RuntimeError: The constructor or `reconfigure` keeps failing; the previous version serves again.
            NoInstanceError: No instance is running.
        """
        if is_importing():
            logger.debug("Importing is not deploying: deploy() of %r does nothing", self.name)
            return None
        given: dict[str, Any] = {"init_args": init_args, "init_kwargs": init_kwargs} if init_args or init_kwargs else {}
        _check_init_args(self.func_or_class, given or self._options)
        instance = THIS_PROCESS.current()
        goal = instance.put(self.to_spec(instance.codec, **given))
        if not _blocking:
            return goal
        goal.wait()
        instance.put_declared_schedules([goal.name])
        return None

    def bind(self, *args: Any, **kwargs: Any) -> Application[T_co]:
        """An application of this deployment, for `serve.run`.

        Args:
            args, kwargs: Arguments of the constructor. Applications among them, in lists, tuples and dicts too, are
                deployed as well, and are handles in the replica.
        """
        return Application(self, args, kwargs)

    def delete(self) -> None:
        """Delete the deployment, and return when it is gone. Calls that were sent before are finished.

        Raises:
            NoInstanceError: No instance is running.
        """
        if is_importing():
            logger.debug("Importing is not deploying: delete() of %r does nothing", self.name)
            return
        THIS_PROCESS.current().delete(self.name)

    @overload
    def get_handle(self, sync: Literal[True] = True) -> DeploymentHandle[T_co]: ...
    @overload
    def get_handle(self, sync: Literal[False]) -> AsyncDeploymentHandle[T_co]: ...
    @overload
    def get_handle(self, sync: bool) -> DeploymentHandle[T_co] | AsyncDeploymentHandle[T_co]: ...
    def get_handle(self, sync: bool = True) -> DeploymentHandle[T_co] | AsyncDeploymentHandle[T_co]:
        """A handle to call it from Python. It need not be deployed yet: calls wait for replicas.

        Args:
            sync: Whether the handle blocks. False is for code on an event loop: `ref = await handle.remote()`.
        """
        return get_handle(self.name, sync=sync)

    def options(
        self, func_or_class: Callable[..., Any] | None = None, **options: Unpack[GivenOptions]
    ) -> "Deployment[T_co]":
        """A copy with other options. What is not given, or given as None, stays; `route_prefix=None` is an option.

        `prev_version` is a condition of one deploy and is not copied. `num_replicas` ends autoscaling, and
        `autoscaling_config` begins it.

        Args:
            func_or_class: Other code to serve.
            options: Those of `serve.deployment`.

        Raises:
            TypeError, ValueError: An option is not what it should be.
        """
        known = known_options(options, "Deployment.options")
        code, target = (self._code, self._target) if func_or_class is None else (func_or_class, None)
        return _make(code, target, changed_options(self._options, known), self._membership)

    def as_member(self, membership: Membership) -> "Deployment[T_co]":
        """A copy that belongs to an application."""
        return _make(self._code, self._target, self._options, membership)

    def to_spec(
        self,
        codec: Codec,
        *,
        init_args: Sequence[Any] | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> DeploymentSpec:
        """The spec to write to the state, as a new revision; `deploying.next_spec` decides what stays of the last one.

        Args:
            init_args, init_kwargs: Arguments of the constructor; both None: those of the decorator.

        Raises:
            ValueError: A function was given arguments of a constructor.
            ConfigurationError: The code cannot be sent to other processes.
            ValueNotSerializable: An argument of the constructor or the user_config cannot be sent.
        """
        options, name, code = self._options, self.name, self.func_or_class
        if init_args is not None or init_kwargs is not None:
            options = {**options, "init_args": tuple(init_args or ()), "init_kwargs": dict(init_kwargs or {})}
        _check_init_args(code, options)
        user_config, scaling, when_full, actor_options = (
            options[each] for each in ("user_config", "autoscaling_config", "backpressure_config", "ray_actor_options")
        )
        in_another_form: dict[str, Any] = {
            "route_prefix": self.route_prefix,
            "autoscaling": None if scaling is None else Autoscaling(**scaling.model_dump()),
            "backpressure": None if when_full is None else Backpressure(**when_full.model_dump()),
            "user_config": None if user_config is None else codec.pack(user_config, f"user_config of {name!r}"),
            "init_args": codec.pack_call(options["init_args"], options["init_kwargs"], f"the constructor of {name!r}"),
            "ray_actor_options": codec.pack(actor_options, f"ray_actor_options of {name!r}") if actor_options else b"",
        }
        task_queue, task_names = getattr(code, "__qserve_tasks__", ("", ()))
        target = self._target or make_target(code, allow_pickle=codec.allow_pickle)
        return DeploymentSpec(
            target=target,
            sources=source_digests(
                target.sys_path, getattr(code, "__module__", None) or "", is_pickled=bool(target.pickled)
            ),
            methods=method_names(code),
            revision=uuid.uuid4().hex,
            is_class=inspect.isclass(code),
            is_ingress=hasattr(code, "__qserve_asgi__"),
            deployed_at=time.time(),
            task_queue=task_queue,
            task_names=task_names,
            **self._membership._asdict(),
            **{each.field: options[each.field] for each in DECLARED if each.field not in in_another_form},
            **in_another_form,
        )

    @classmethod
    def from_spec(cls, spec: DeploymentSpec, codec: Codec) -> "Deployment[Any]":
        """The deployment that a spec describes. Its code is imported only when `func_or_class` is asked for."""
        options = {each.field: getattr(spec, each.field) for each in DECLARED}
        scaling, when_full = options.pop("autoscaling"), options.pop("backpressure")
        with importing():  # unpacking may import modules of the user's
            options["init_args"], options["init_kwargs"] = (
                codec.unpack_call(spec.init_args) if spec.init_args else ((), {})
            )
            options["user_config"] = None if spec.user_config is None else codec.unpack(spec.user_config)
            options["ray_actor_options"] = codec.unpack(spec.ray_actor_options) if spec.ray_actor_options else {}
        options["autoscaling_config"] = scaling and msgspec.to_builtins(scaling)
        options["backpressure_config"] = when_full and msgspec.to_builtins(when_full)
        return _make(
            None, spec.target, complete_options(options), Membership(spec.application, spec.is_root, spec.declared)
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Deployment):
            return NotImplemented
        return _identity(self) == _identity(other)

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    def __repr__(self) -> str:
        return f"Deployment(name={self.name!r}, version={self.version!r}, route_prefix={self.route_prefix!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        options = {name: value for name, value in self._options.items() if not isinstance(value, Default)}
        for name in ("autoscaling_config", "backpressure_config"):
            if options[name] is not None:
                options[name] = options[name].model_dump()
        return unpickle_deployment, (
            self._code,
            None if self._target is None else msgspec.structs.astuple(self._target),
            options,
            tuple(self._membership),
        )


def unpickle_deployment(
    code: Callable[..., Any] | None,
    target: tuple[Any, ...] | None,
    options: Mapping[str, Any],
    membership: tuple[str, bool] | tuple[str, bool, str] = ALONE,
) -> Deployment[Any]:
    """The deployment that was pickled.

    Every pickle of a deployment names this function, as `qserve.serve.unpickle_deployment`, and besides the user's code
    plain data: so a deployment can be read by another version of qserve than the one that has pickled it.
    """
    known = {name: value for name, value in options.items() if name in GivenOptions.__annotations__}
    made = complete_options(known)
    return _make(code, None if target is None else Target(*target), made, Membership(*membership))


def _identity(deployment: Deployment[Any]) -> dict[str, Any]:
    told_apart = {**deployment._options, "route_prefix": deployment.route_prefix}
    for name in ("prev_version", "ray_actor_options"):
        del told_apart[name]
    return told_apart


def _make(
    code: Callable[..., Any] | None,
    target: Target | None,
    options: Mapping[str, Any],
    membership: Membership = ALONE,
) -> Deployment[Any]:
    """A deployment with these options, which are complete and checked."""
    made: Deployment[Any] = object.__new__(Deployment)
    made._code, made._target, made._options, made._membership = code, target, options, membership
    return made


def _check_init_args(code: Callable[..., Any], options: Mapping[str, Any]) -> None:
    given = next((name for name in ("init_args", "init_kwargs") if options[name]), None)
    if given is not None and not inspect.isclass(code):
        raise ValueError(f"{given} not supported for function deployments.")


if TYPE_CHECKING:

    class DeployedClass(type, Deployment[Any]):
        """What mypy takes a decorated class for, with `qserve.mypy_plugin`: the class, and a deployment of it."""

        @overload
        def get_handle(cls: type[T], sync: Literal[True] = True) -> DeploymentHandle[T]: ...
        @overload
        def get_handle(cls: type[T], sync: Literal[False]) -> AsyncDeploymentHandle[T]: ...
        @overload
        def get_handle(cls: type[T], sync: bool) -> DeploymentHandle[T] | AsyncDeploymentHandle[T]: ...
        def get_handle(cls: type[T], sync: bool = True) -> Any: ...
        def bind(cls: type[T], *args: Any, **kwargs: Any) -> Application[T]: ...
        def options(
            cls: type[T], func_or_class: Callable[..., Any] | None = None, **options: Unpack[GivenOptions]
        ) -> Deployment[T]: ...

    class DeployedAbstractClass(ABCMeta, DeployedClass):
        """The same for a class that is derived from `abc.ABC`."""


class DeploymentDecorator(Protocol):
    """The type of `serve.deployment(...)`, which makes a Deployment of a class or function."""

    # A class is a callable too: the first overload that fits counts.
    @overload
    def __call__(self, func_or_class: type[T], /) -> Deployment[T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, func_or_class: Callable[P, R], /) -> Deployment[Callable[P, R]]: ...


@overload
def deployment(func_or_class: type[T], /) -> Deployment[T]: ...  # type: ignore[overload-overlap]
@overload
def deployment(func_or_class: Callable[P, R], /) -> Deployment[Callable[P, R]]: ...
@overload
def deployment(func_or_class: str | None = None, /, **options: Unpack[GivenOptions]) -> DeploymentDecorator: ...
def deployment(func_or_class: Any = None, /, **options: Any) -> Any:
    """Make a deployment of a class or function; used as `@deployment`, `@deployment()` or `@deployment(name=..., ...)`.

    Args:
        func_or_class: The class or function, or the name of the deployment.
        options: The table "Deployment options" in docs/configuration.md describes them.

    Raises:
        TypeError, ValueError: An option is not what it should be.
    """
    given = given_options(known_options(options, "serve.deployment"))
    if isinstance(func_or_class, str):
        given.setdefault("name", func_or_class)
    complete_options({"name": "unnamed", **given})

    def decorate(code: Callable[..., Any]) -> Deployment[Any]:
        if isinstance(code, Deployable) or not callable(code):
            raise TypeError(f"@serve.deployment expects a class or a function, not {code!r}.")
        if isinstance(code, Starlette | Router):
            raise TypeError(
                f"{type(code).__name__} is an application, which a class serves: @serve.deployment and below it "
                "@serve.ingress(app), above a class that may be empty."
            )
        name = getattr(code, "__name__", type(code).__name__)
        return _make(code, None, complete_options({"name": name, **given}))

    return decorate if func_or_class is None or isinstance(func_or_class, str) else decorate(func_or_class)
