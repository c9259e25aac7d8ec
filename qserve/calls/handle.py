"""Handles: how Python code calls a deployment."""

from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from typing import Any, Generic, Literal, ParamSpec, TypeVar, Unpack, overload

import msgspec

from qserve.calls.call_options import CallOptions, Changes, DurableTerms, changed_options
from qserve.calls.client import Client
from qserve.calls.durable_ref import DurableRef, submit
from qserve.calls.hooked import HookedCall
from qserve.calls.outgoing import CallRef
from qserve.calls.process_client import current_client
from qserve.calls.ref import Ref
from qserve.calls.streams import ResultStream, open_stream
from qserve.errors import ValueNotSerializable
from qserve.wire.call_record import DurableOptions, Terms
from qserve.wire.codec import Codec, collect_refs, substitute

P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)
Submitted = tuple[DurableRef[Any], Ref[None]]


class _BaseHandle:
    """What sync and async handles share; immutable, thread-safe, not bound to any event loop."""

    _sync: bool
    _kind: str
    """What a pickle calls this class."""

    def __init__(self, deployment_name: str, options: CallOptions = CallOptions()) -> None:  # noqa: B008
        self._name = deployment_name
        self._options = options

    @property
    def deployment_name(self) -> str:
        """The name of the deployment that is called."""
        return self._name

    def __repr__(self) -> str:
        method = f", method {self._options.method_name!r}" if self._options.method_name else ""
        return f"<{type(self).__name__} of {self._name!r}{method}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickle_handle, (self._kind, self._name, self._options._asdict())

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        return "handle", {"name": self._name, "sync": self._sync, "options": self._options._asdict()}

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


class DeploymentHandle(_BaseHandle, Generic[T_co]):
    """Calls a deployment from synchronous code: `remote()` returns a ref at once."""

    _sync = True
    _kind = "sync"

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
        changed, terms = changed_options(self._options, method_name, others, stream=stream, durable=durable)
        if terms is not None:
            return DurableHandle(self._name, changed, terms)
        return StreamHandle(self._name, changed) if stream else DeploymentHandle(self._name, changed)

    def __getattr__(self, name: str) -> "DeploymentHandle[Any]":
        _refuse_private(self, name)
        return DeploymentHandle(self._name, self._options._replace(method_name=name))


class AsyncDeploymentHandle(_BaseHandle, Generic[T_co]):
    """Calls a deployment from asynchronous code: `await remote()` gives a ref, awaiting that gives the result."""

    _sync = False
    _kind = "async"

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
        changed, terms = changed_options(self._options, method_name, others, stream=stream, durable=durable)
        if terms is not None:
            return AsyncDurableHandle(self._name, changed, terms)
        return StreamHandle(self._name, changed) if stream else AsyncDeploymentHandle(self._name, changed)

    def __getattr__(self, name: str) -> "AsyncDeploymentHandle[Any]":
        _refuse_private(self, name)
        return AsyncDeploymentHandle(self._name, self._options._replace(method_name=name))


class StreamHandle(_BaseHandle):
    """Calls a generator method: `remote()` returns a stream to iterate with `for` or `async for`."""

    _sync = True
    _kind = "stream"

    def remote(self, *args: Any, **kwargs: Any) -> ResultStream[Any]:
        """Put a call on the deployment's queue, at once or when the refs among its arguments are there.

        Raises:
            ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
            NoInstanceError, BrokerUnavailable: There is no qserve instance to call.
        """
        client, method = current_client().of(self._name), self._options.method_name
        what = (client, codec_of(client), self._name, method, args, kwargs, self._options.timeout_s)
        if client.hooks is None or (hooks := client.hooks.choose(self._name)) is None:
            return open_stream(*what, meta=self._options.meta)
        with HookedCall(hooks, self._name, method, "stream") as hooked:
            return open_stream(*what, meta={**hooked.meta, **self._options.meta}, on_end=hooked.end)

    def __getattr__(self, name: str) -> "StreamHandle":
        _refuse_private(self, name)
        return StreamHandle(self._name, self._options._replace(method_name=name))

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        raise ValueNotSerializable(
            f"{self!r} cannot be sent: send the plain handle, and call options(stream=True) where it arrives"
        )


class _BaseDurableHandle(_BaseHandle):
    """What sync and async handles of durable calls share."""

    def __init__(self, deployment_name: str, options: CallOptions, terms: DurableOptions) -> None:
        super().__init__(deployment_name, options)
        self._terms = terms

    def _submit(self, args: tuple[Any, ...], kwargs: dict[str, Any], client: Client | None = None) -> Submitted:
        client = (client or current_client()).of(self._name)
        if client.hooks is None or (hooks := client.hooks.choose(self._name)) is None:
            return self._put(client, args, kwargs, self._options.meta)
        with HookedCall(hooks, self._name, self._options.method_name, "call", durable=True) as hooked:
            ref, admitted = self._put(client, args, kwargs, {**hooked.meta, **self._options.meta})
        admitted.add_done_callback(hooked.end_with)
        return ref, admitted

    def _put(self, client: Client, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Mapping[str, str]) -> Submitted:
        codec, method = codec_of(client), self._options.method_name
        payload = codec.pack_plain_call(args, kwargs)
        if payload is None:
            payload = codec.pack_call(args, kwargs, f"the call to {self._name}")
        return submit(client, codec, self._name, method, payload, self._terms, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        terms = self._terms._asdict() | {"terms": msgspec.structs.asdict(self._terms.terms)}
        return unpickle_handle, (self._kind, self._name, self._options._asdict(), terms)

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        raise ValueNotSerializable(
            f"{self!r} cannot be sent: send the plain handle, and call options(durable=True) where it arrives"
        )


class DurableHandle(_BaseDurableHandle):
    """Submits durable calls: `remote()` returns once Redis has the call, with a ref that any process can take up."""

    _sync = True
    _kind = "durable"

    def remote(self, *args: Any, **kwargs: Any) -> DurableRef[Any]:
        """Submit a call. Refs among the arguments are waited for first.

        Raises:
            BackPressureError, DeploymentNotFound, DeploymentUnavailable: The call was refused.
            BrokerUnavailable: Redis did not confirm the call in time; it may have it all the same.
            ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
            RuntimeError: Called where waiting would stop the event loop; use an asynchronous handle there.
        """
        if current_client().is_own_thread():
            raise RuntimeError(
                "submitting here would block the event loop that receives the confirmation: use "
                f"serve.get_deployment({self._name!r}).get_handle(sync=False) and `await handle.remote()`"
            )
        if refs := collect_refs(args, kwargs):
            args, kwargs = substitute(args, kwargs, {ref: ref.result() for ref in refs})
        ref, admitted = self._submit(args, kwargs)
        admitted.result()
        return ref

    def __getattr__(self, name: str) -> "DurableHandle":
        _refuse_private(self, name)
        return DurableHandle(self._name, self._options._replace(method_name=name), self._terms)


class AsyncDurableHandle(_BaseDurableHandle):
    """Like `DurableHandle`, for asynchronous code: `await remote()` gives the ref."""

    _sync = False
    _kind = "async durable"

    async def remote(self, *args: Any, **kwargs: Any) -> DurableRef[Any]:
        """Like `DurableHandle.remote`."""
        if refs := collect_refs(args, kwargs):
            args, kwargs = substitute(args, kwargs, {ref: await ref for ref in refs})
        ref, admitted = self._submit(args, kwargs)
        await admitted
        return ref

    def __getattr__(self, name: str) -> "AsyncDurableHandle":
        _refuse_private(self, name)
        return AsyncDurableHandle(self._name, self._options._replace(method_name=name), self._terms)


def _refuse_private(handle: _BaseHandle, name: str) -> None:
    if name.startswith("_"):  # copy, pickle and IPython ask for such names
        raise AttributeError(f"{type(handle).__name__} has no attribute {name!r}; private methods cannot be called")


def codec_of(client: Client) -> Codec:
    """The codec for the calls of a client, which may use pickle only if the frames are signed."""
    return _codec(client.signer.signs, client.settings.max_value_bytes, client.settings.out_of_line_bytes)


@lru_cache(maxsize=8)
def _codec(signs: bool, max_bytes: int, large: int) -> Codec:
    return Codec(allow_pickle=signs, max_bytes=max_bytes, make_handle=handle_from_wire, large=large + 1)


def handle_from_wire(data: dict[str, Any]) -> "DeploymentHandle[Any] | AsyncDeploymentHandle[Any]":
    """The handle that another process has sent, from what `__qserve_wire__` gave there."""
    return _handle(data["name"], _restored(data["options"]), sync=data["sync"])


def unpickle_handle(kind: str, name: str, options: dict[str, Any], terms: dict[str, Any] | None = None) -> object:
    """The handle that was pickled.

    Every pickle of a handle names this function, as `qserve.serve.unpickle_handle`, and plain data: so a handle can
    be read by another version of qserve than the one that has pickled it.
    """
    restored = _restored(options)
    if terms is not None:
        durable = DurableOptions(**terms | {"terms": Terms(**terms["terms"])})
        return (
            DurableHandle(name, restored, durable) if kind == "durable" else AsyncDurableHandle(name, restored, durable)
        )
    if kind == "stream":
        return StreamHandle(name, restored)
    return _handle(name, restored, sync=kind == "sync")


def _handle(name: str, options: CallOptions, *, sync: bool) -> "DeploymentHandle[Any] | AsyncDeploymentHandle[Any]":
    if options == CallOptions():
        return get_handle(name, sync=sync)
    return DeploymentHandle(name, options) if sync else AsyncDeploymentHandle(name, options)


def _restored(options: dict[str, Any]) -> CallOptions:
    known = {key: options[key] for key in CallOptions._fields if key in options}
    return CallOptions(**known | {"http_headers": tuple((key, value) for key, value in options["http_headers"])})


@overload
def get_handle(name: str, *, sync: Literal[True] = True) -> DeploymentHandle[Any]: ...
@overload
def get_handle(name: str, *, sync: Literal[False]) -> AsyncDeploymentHandle[Any]: ...
@overload
def get_handle(name: str, *, sync: bool) -> DeploymentHandle[Any] | AsyncDeploymentHandle[Any]: ...
def get_handle(name: str, *, sync: bool = True) -> DeploymentHandle[Any] | AsyncDeploymentHandle[Any]:
    """The handle of a deployment, which need not exist yet; the same object for the same name and kind."""
    return _cached_handle(name, sync)


@lru_cache(maxsize=100)
def _cached_handle(name: str, sync: bool) -> DeploymentHandle[Any] | AsyncDeploymentHandle[Any]:
    return DeploymentHandle(name) if sync else AsyncDeploymentHandle(name)
