"""Handles: how Python code calls a deployment."""

from collections.abc import Callable, Coroutine
from typing import Any, Generic, Literal, ParamSpec, Unpack, overload

from typing_extensions import TypeVar

from qserve.calls.handles.base_handle import BaseHandle, made_by, plain_handle, refuse_private
from qserve.calls.handles.call_options import Changes, DurableTerms
from qserve.calls.handles.durable_handle import AsyncDurableHandle, DurableHandle
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.handles.hooked import HookedCall
from qserve.calls.handles.stream_handle import StreamHandle
from qserve.calls.outgoing import CallRef
from qserve.calls.process_client import current_client
from qserve.calls.ref import Ref

P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True, default=Any)


class _PlainHandle(BaseHandle):
    """What sync and async handles of ordinary calls share."""

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref[Any]:
        client, options = current_client().of(self._name), self._options
        ref = CallRef(client, codec_of(client), self._name, options.method_name, options.timeout_s)
        if client.hooks is None or (hooks := client.hooks.choose(self._name)) is None:
            ref.start(args, kwargs, options.meta)
        else:
            with HookedCall(hooks, self._name, options.method_name, "call") as hooked:
                ref.start(args, kwargs, {**hooked.meta, **options.meta})
            ref.add_done_callback(hooked.end_with)
        return ref


class DeploymentHandle(_PlainHandle, Generic[T_co]):
    """Calls a deployment from synchronous code: `remote()` returns a ref at once."""

    _sync = True

    # An `async def` result is awaited in the replica. A ref among the arguments stands for its value, which a ParamSpec
    # cannot say: with a ref in the first or second place the arguments are not checked.
    @overload
    def remote(
        self: "DeploymentHandle[Callable[P, Coroutine[Any, Any, R]]]", *args: P.args, **kwargs: P.kwargs
    ) -> Ref[R]: ...
    @overload
    def remote(self: "DeploymentHandle[Callable[P, R]]", *args: P.args, **kwargs: P.kwargs) -> Ref[R]: ...
    @overload
    def remote(
        self: "DeploymentHandle[Callable[..., Coroutine[Any, Any, R]]]", first: Ref[Any], /, *args: Any, **kwargs: Any
    ) -> Ref[R]: ...
    @overload
    def remote(self: "DeploymentHandle[Callable[..., R]]", first: Ref[Any], /, *args: Any, **kwargs: Any) -> Ref[R]: ...
    @overload
    def remote(
        self: "DeploymentHandle[Callable[..., Coroutine[Any, Any, R]]]",
        first: Any,
        second: Ref[Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Ref[R]: ...
    @overload
    def remote(
        self: "DeploymentHandle[Callable[..., R]]", first: Any, second: Ref[Any], /, *args: Any, **kwargs: Any
    ) -> Ref[R]: ...
    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Put a call on the deployment's queue.

        Returns:
            A ref to the result. What goes wrong after this point is raised by the ref.

        Raises:
            ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
            NoInstanceError, BrokerUnavailable: There is no qserve instance to call.
        """
        return self._call(args, kwargs)

    @overload
    def options(
        self,
        *,
        method_name: None = None,
        stream: Literal[False] = False,
        **changes: Unpack[Changes],
    ) -> "DeploymentHandle[T_co]": ...
    @overload
    def options(
        self,
        *,
        method_name: str,
        stream: Literal[False] = False,
        **changes: Unpack[Changes],
    ) -> "DeploymentHandle[Any]": ...
    @overload
    def options(
        self,
        *,
        method_name: str | None = None,
        stream: Literal[True],
        **changes: Unpack[Changes],
    ) -> "StreamHandle": ...
    @overload
    def options(
        self,
        *,
        method_name: str | None = None,
        durable: Literal[True],
        **terms: Unpack[DurableTerms],
    ) -> "DurableHandle": ...
    def options(
        self,
        *,
        method_name: str | None = None,
        stream: bool = False,
        durable: bool = False,
        **others: Any,
    ) -> "DeploymentHandle[Any] | StreamHandle | DurableHandle":
        """Return a handle with other options. This handle stays as it is.

        Args:
            method_name: Method to call instead of `__call__`.
            timeout_s: Seconds until a call ends in GetTimeoutError.
            http_method, http_headers, shard_key, session_id: Accepted, without effect on plain calls.
            multiplexed_model_id: The model that the calls are for; see `serve.multiplexed`.
            stream: Give what a generator method yields, as it yields it.
            durable: The call outlives this process: `remote()` returns once Redis has it, and any process can ask for
                its result by the ref's `id`. It runs at least once. The options below are for durable calls:
            delay: Seconds before it may run.
            retries: How often it may run again after it raised; then it is a dead letter.
            backoff: Seconds before the first retry, about; doubled for each one after, 600 at most.
            retry_on: Exception classes, or their names, to try again after; else after any that user code raises.
            expires: Seconds after which it is not started any more (as is `timeout_s`); else it waits as long as it
                takes.
            priority: "batch" calls run while no other ones wait.
            result_ttl: Seconds for which the result is kept.
            durability: Where Redis has the call when `remote()` returns: "memory"; "fsync": its disk; "replica": the
                memory of a replica, too. Else as QSERVE_DURABILITY says.
        """
        made: DeploymentHandle[Any] | StreamHandle | DurableHandle = self._changed(
            method_name, others, stream=stream, durable=durable
        )
        return made

    def __getattr__(self, name: str) -> "DeploymentHandle[Any]":
        refuse_private(self, name)
        return DeploymentHandle(self._name, self._options._replace(method_name=name))


class AsyncDeploymentHandle(_PlainHandle, Generic[T_co]):
    """Calls a deployment from asynchronous code: `await remote()` gives a ref, awaiting that gives the result."""

    _sync = False

    @overload
    async def remote(
        self: "AsyncDeploymentHandle[Callable[P, Coroutine[Any, Any, R]]]", *args: P.args, **kwargs: P.kwargs
    ) -> Ref[R]: ...
    @overload
    async def remote(self: "AsyncDeploymentHandle[Callable[P, R]]", *args: P.args, **kwargs: P.kwargs) -> Ref[R]: ...
    @overload
    async def remote(
        self: "AsyncDeploymentHandle[Callable[..., Coroutine[Any, Any, R]]]",
        first: Ref[Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Ref[R]: ...
    @overload
    async def remote(
        self: "AsyncDeploymentHandle[Callable[..., R]]", first: Ref[Any], /, *args: Any, **kwargs: Any
    ) -> Ref[R]: ...
    @overload
    async def remote(
        self: "AsyncDeploymentHandle[Callable[..., Coroutine[Any, Any, R]]]",
        first: Any,
        second: Ref[Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Ref[R]: ...
    @overload
    async def remote(
        self: "AsyncDeploymentHandle[Callable[..., R]]", first: Any, second: Ref[Any], /, *args: Any, **kwargs: Any
    ) -> Ref[R]: ...
    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Like `DeploymentHandle.remote`; reads the bodies of Starlette requests among the arguments first."""
        for value in args:
            if type(value).__module__ == "starlette.requests":
                await value.body()
        return self._call(args, kwargs)

    @overload
    def options(
        self,
        *,
        method_name: None = None,
        stream: Literal[False] = False,
        **changes: Unpack[Changes],
    ) -> "AsyncDeploymentHandle[T_co]": ...
    @overload
    def options(
        self,
        *,
        method_name: str,
        stream: Literal[False] = False,
        **changes: Unpack[Changes],
    ) -> "AsyncDeploymentHandle[Any]": ...
    @overload
    def options(
        self,
        *,
        method_name: str | None = None,
        stream: Literal[True],
        **changes: Unpack[Changes],
    ) -> "StreamHandle": ...
    @overload
    def options(
        self,
        *,
        method_name: str | None = None,
        durable: Literal[True],
        **terms: Unpack[DurableTerms],
    ) -> "AsyncDurableHandle": ...
    def options(
        self,
        *,
        method_name: str | None = None,
        stream: bool = False,
        durable: bool = False,
        **others: Any,
    ) -> "AsyncDeploymentHandle[Any] | StreamHandle | AsyncDurableHandle":
        """Like `DeploymentHandle.options`."""
        made: AsyncDeploymentHandle[Any] | StreamHandle | AsyncDurableHandle = self._changed(
            method_name, others, stream=stream, durable=durable
        )
        return made

    def __getattr__(self, name: str) -> "AsyncDeploymentHandle[Any]":
        refuse_private(self, name)
        return AsyncDeploymentHandle(self._name, self._options._replace(method_name=name))


made_by("sync", DeploymentHandle)
made_by("async", AsyncDeploymentHandle)


@overload
def get_handle(name: str, *, sync: Literal[True] = True) -> DeploymentHandle[Any]: ...
@overload
def get_handle(name: str, *, sync: Literal[False]) -> AsyncDeploymentHandle[Any]: ...
@overload
def get_handle(name: str, *, sync: bool) -> DeploymentHandle[Any] | AsyncDeploymentHandle[Any]: ...
def get_handle(name: str, *, sync: bool = True) -> DeploymentHandle[Any] | AsyncDeploymentHandle[Any]:
    """The handle of a deployment, which need not exist yet; the same object for the same name and kind."""
    made: Any = plain_handle("sync" if sync else "async", name)
    return made  # type: ignore[no-any-return]
