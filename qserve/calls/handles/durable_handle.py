"""Handles whose calls are durable."""

from collections.abc import Mapping
from typing import Any, Literal, Self, Unpack, overload

from qserve.calls.client import Client
from qserve.calls.durable_ref import DurableRef, submit
from qserve.calls.handles.base_handle import BaseHandle, made_by, refuse_private
from qserve.calls.handles.call_options import CallOptions, Changes, DurableTerms
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.handles.hooked import HookedCall
from qserve.calls.process_client import current_client
from qserve.calls.ref import Ref
from qserve.errors import ValueNotSerializable
from qserve.wire.call_record import DurableOptions
from qserve.wire.codec import collect_refs, substitute

Submitted = tuple[DurableRef[Any], Ref[None]]


class _BaseDurableHandle(BaseHandle):
    """What sync and async handles of durable calls share."""

    def __init__(self, deployment_name: str, options: CallOptions, terms: DurableOptions) -> None:
        super().__init__(deployment_name, options)
        self._terms: DurableOptions = terms

    @overload
    def options(
        self, *, method_name: str | None = None, durable: Literal[True] = True, **terms: Unpack[DurableTerms]
    ) -> Self: ...
    @overload
    def options(
        self,
        *,
        method_name: str | None = None,
        durable: Literal[False],
        stream: bool = False,
        **changes: Unpack[Changes],
    ) -> Any: ...
    @overload
    def options(self, *, method_name: str | None = None, stream: Literal[True], **changes: Unpack[Changes]) -> Any: ...
    def options(
        self,
        *,
        method_name: str | None = None,
        stream: bool | None = None,
        durable: bool | None = None,
        **others: Any,
    ) -> Any:
        """Like `DeploymentHandle.options`. What is not given stays: calls are durable, on the same terms."""
        return self._changed(method_name, others, stream=stream, durable=durable)

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

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        raise ValueNotSerializable(
            f"{self!r} cannot be sent: send the plain handle, and call options(durable=True) where it arrives"
        )


class DurableHandle(_BaseDurableHandle):
    """Submits durable calls: `remote()` returns once Redis has the call, with a ref that any process can take up."""

    _sync = True

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
        refuse_private(self, name)
        return DurableHandle(self._name, self._options._replace(method_name=name), self._terms)


class AsyncDurableHandle(_BaseDurableHandle):
    """Like `DurableHandle`, for asynchronous code: `await remote()` gives the ref."""

    _sync = False

    async def remote(self, *args: Any, **kwargs: Any) -> DurableRef[Any]:
        """Like `DurableHandle.remote`."""
        if refs := collect_refs(args, kwargs):
            args, kwargs = substitute(args, kwargs, {ref: await ref for ref in refs})
        ref, admitted = self._submit(args, kwargs)
        await admitted
        return ref

    def __getattr__(self, name: str) -> "AsyncDurableHandle":
        refuse_private(self, name)
        return AsyncDurableHandle(self._name, self._options._replace(method_name=name), self._terms)


made_by("durable", DurableHandle)
made_by("async durable", AsyncDurableHandle)
