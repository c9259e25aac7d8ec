"""Handles whose calls are streamed."""

from functools import partial
from typing import Any, Literal, Unpack, overload

from qserve.calls.handles.base_handle import BaseHandle, made_by, refuse_private
from qserve.calls.handles.call_options import CallOptions, Changes, DurableTerms
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.handles.hooked import HookedCall
from qserve.calls.process_client import current_client
from qserve.calls.streams import ResultStream, open_stream
from qserve.errors import ValueNotSerializable


class StreamHandle(BaseHandle):
    """Calls a generator method: `remote()` returns a stream to iterate with `for` or `async for`."""

    _streams = True

    def __init__(self, deployment_name: str, options: CallOptions = CallOptions(), *, sync: bool = True) -> None:  # noqa: B008
        super().__init__(deployment_name, options)
        self._sync = sync
        """Which handle `options(stream=False)` gives."""

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

    @overload
    def options(
        self, *, method_name: str | None = None, stream: Literal[True] = True, **changes: Unpack[Changes]
    ) -> "StreamHandle": ...
    @overload
    def options(self, *, method_name: str | None = None, stream: Literal[False], **changes: Unpack[Changes]) -> Any: ...
    @overload
    def options(
        self, *, method_name: str | None = None, durable: Literal[True], **terms: Unpack[DurableTerms]
    ) -> Any: ...
    def options(
        self,
        *,
        method_name: str | None = None,
        stream: bool | None = None,
        durable: bool | None = None,
        **others: Any,
    ) -> Any:
        """Like `DeploymentHandle.options`. Calls are streamed as before, unless `stream` or `durable` is given."""
        return self._changed(method_name, others, stream=stream, durable=durable)

    def __getattr__(self, name: str) -> "StreamHandle":
        refuse_private(self, name)
        return StreamHandle(self._name, self._options._replace(method_name=name), sync=self._sync)

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        raise ValueNotSerializable(
            f"{self!r} cannot be sent: send the plain handle, and call options(stream=True) where it arrives"
        )


made_by("stream", StreamHandle)
made_by("async stream", partial(StreamHandle, sync=False))
