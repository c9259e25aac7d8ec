"""Spans of OpenTelemetry for every call: the hooks that QSERVE_TRACES adds to those of QSERVE_HOOKS.

Nothing else imports this module, and so nothing of OpenTelemetry is imported where traces are off. What decides whether
a call is traced is decided once, where its trace begins, and travels with it: a call that is not traced carries nothing
and meets no hook.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points, version
from typing import Any, NamedTuple

from qserve.background import CHANCE
from qserve.context import current_call
from qserve.errors import ConfigurationError
from qserve.hooks import (
    Batch,
    BatchHook,
    ClientCall,
    ClientHook,
    GatewayHook,
    GatewayRequest,
    ReplicaCall,
    ReplicaHook,
)
from qserve.settings import Settings
from qserve.telemetry.exporter_log import say_seldom
from qserve.telemetry.log_records import this_process

try:
    from opentelemetry import baggage, context, trace
    from opentelemetry.baggage.propagation import W3CBaggagePropagator
    from opentelemetry.propagators.composite import CompositePropagator
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Link, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    from qserve.telemetry.later_spans import LaterSpans, LaterTracer, MakingExporter
except ModuleNotFoundError as exc:
    raise ConfigurationError(
        f"QSERVE_TRACES is set, but {exc.name} is not installed here: pip install 'qserve[otel]', or unset it."
    ) from exc

_W3C = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
_NOWHERE = context.Context()
_KEPT = trace.TraceFlags(0x03)
"""Of a trace that is kept, and whose id is random."""
_HEADER = b"traceparent"
_PLAIN = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
"""A `traceparent` as `_tell` writes it."""
_HEADERS = frozenset({b"traceparent", b"tracestate", b"baggage"})


class _Source(NamedTuple):
    """Where spans come from.

    Attributes:
        tracer: Makes them. Where the provider is ours, it makes all it is asked for.
        begins: Whether a call that is part of no trace shall begin one.
        links: Durable calls begin a trace of their own, which is linked with that of their caller.
    """

    tracer: Any
    begins: Callable[[], bool]
    links: bool


@cache
def source() -> _Source:
    """Made at the first call, and so in the process that makes the spans, after user code has set up what it wants."""
    links, name = Settings().trace_durable == "link", ("qserve", version("qserve"))
    provider: Any = trace.get_tracer_provider()
    if not isinstance(provider, trace.ProxyTracerProvider):
        return _Source(provider.get_tracer(*name), lambda: True, links)  # its own sampler decides
    here = this_process()
    about = {"service.name": here.deployment or f"qserve-{here.process}", "service.instance.id": here.replica}
    standard = Resource.create()  # what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins
    named = not str(standard.attributes.get("service.name", "")).startswith("unknown_service")
    resource = Resource(about).merge(standard) if named else standard.merge(Resource(about))
    provider = TracerProvider(resource=resource)
    trace.set_tracer_provider(provider)
    own = LaterTracer(resource, *name)
    say_seldom()
    for exporter in _exporter_classes():
        processor = BatchSpanProcessor(MakingExporter(exporter()))
        provider.add_span_processor(processor)  # which flushes it when the process ends
        own.add_processor(processor)
    ratio, draw = _ratio(), CHANCE.random
    return _Source(own, lambda: draw() < ratio, links)


def check() -> None:
    """Whether the environment says what can be done.

    Raises:
        ConfigurationError: It does not.
    """
    _ratio()
    _exporter_classes()


def _ratio() -> float:
    sampler = os.environ.get("OTEL_TRACES_SAMPLER", "always_on").lower().removeprefix("parentbased_")
    if sampler == "traceidratio":
        given = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1")
        try:
            return min(1.0, max(0.0, float(given)))
        except ValueError:
            raise ConfigurationError(f"OTEL_TRACES_SAMPLER_ARG={given!r} is not a number from 0 to 1.") from None
    if sampler in ("always_on", "always_off"):
        return 1.0 if sampler == "always_on" else 0.0
    raise ConfigurationError(
        f"OTEL_TRACES_SAMPLER={sampler!r} is none that qserve knows: always_on, always_off or traceidratio, with or "
        "without parentbased_ before it."
    )


def _exporter_classes() -> list[Any]:
    found = []
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        wanted = name.strip().lower()
        if wanted in ("", "none"):
            continue
        if wanted == "otlp":
            protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
            protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
            wanted = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
        points = tuple(entry_points(group="opentelemetry_traces_exporter", name=wanted))
        if not points:
            raise ConfigurationError(
                f"OTEL_TRACES_EXPORTER names {name.strip()!r}, and no package installed here has it. `otlp` over HTTP "
                "comes with qserve[otel]; over gRPC it needs opentelemetry-exporter-otlp-proto-grpc."
            )
        found.append(points[0].load())
    return found


def _start(
    name: str,
    kind: SpanKind,
    attributes: dict[str, Any],
    parent: trace.SpanContext = trace.INVALID_SPAN_CONTEXT,
    around: context.Context = _NOWHERE,
    links: Sequence[Link] = (),
) -> Any:
    """Begin a span; a sampler of the user's is told what is `around` it, such as baggage."""
    tracer = source().tracer
    if isinstance(tracer, LaterTracer):
        return tracer.start_span(name, parent, kind, attributes, links)
    inside = trace.set_span_in_context(trace.NonRecordingSpan(parent), around)
    return tracer.start_span(name, inside, kind, attributes, links)


class ClientSpans(ClientHook):
    """A span "send NAME" for each call through a handle, from `remote()` to its result; of a durable call, until it is
    accepted."""

    def wants(self, deployment: str) -> bool:
        """Calls of a trace that is kept; where there is none, a new one begins outside of replicas only."""
        here = trace.get_current_span().get_span_context()
        if here.is_valid:
            return bool(here.trace_flags.sampled)
        return current_call.get() is None and source().begins()

    def before(self, call: ClientCall) -> Any:
        """Begin the span, and tell the replica of it."""
        attributes = _messaging(call.deployment, "send") | _what(call.method, call.kind, call.durable)
        here = context.get_current()
        parent = trace.get_current_span(here).get_span_context()
        span = _start(f"send {call.deployment}", SpanKind.PRODUCER, attributes, parent, here)
        _tell(call.meta, span, here)
        return span

    def after(self, call: ClientCall, state: Any) -> None:
        """End it."""
        _end(state)

    def error(self, call: ClientCall, state: Any, error: BaseException) -> None:
        """End it with the error."""
        _end(state, error)


class GatewaySpans(GatewayHook):
    """A span of an HTTP server for each request, and in it "send NAME", both until the response is sent."""

    def wants(self, scope: Mapping[str, Any]) -> bool:
        """Requests of a trace that is kept; those that bring none may begin one."""
        parent = dict(scope["headers"]).get(_HEADER)
        if parent is None:
            return source().begins()
        return bool(parent[-1:] in b"13579bdf") and parent[-3:-2] == b"-"

    def before(self, request: GatewayRequest) -> Any:
        """Begin both, and tell the replica."""
        scope, tracer = request.scope, source().tracer
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _HEADERS}
        if not headers and isinstance(tracer, LaterTracer):
            return _LaterRequest(tracer, request)
        parent, around = trace.INVALID_SPAN_CONTEXT, _NOWHERE
        if headers:
            around = _W3C.extract(headers, context=_NOWHERE)
            parent = trace.get_current_span(around).get_span_context()
        facts = _facts(request)
        server = _start(facts.name, SpanKind.SERVER, facts.of_server(), parent, around)
        here = server.get_span_context()
        send = _start(f"send {facts.deployment}", SpanKind.PRODUCER, facts.of_send(), here, around)
        _tell(request.meta, send, around)
        scope["state"]["trace_id"] = trace_id = f"{here.trace_id:032x}"
        scope["state"]["traceresponse"] = f"00-{trace_id}-{here.span_id:016x}-{here.trace_flags:02x}"
        return server, send

    def after(self, request: GatewayRequest, state: Any, status: int) -> None:
        """End both; a status of 500 and more is an error."""
        if isinstance(state, _LaterRequest):
            state.end(status)
        else:
            _end_request(state, status)

    def error(self, request: GatewayRequest, state: Any, error: BaseException) -> None:
        """End both with the error."""
        if isinstance(state, _LaterRequest):
            state.end(0, error)
        else:
            _end_request(state, 0, error)


class _Facts(NamedTuple):
    """What the spans of a request say of it."""

    deployment: str
    durable: bool
    kind: str
    method: str
    route: str
    path: str
    scheme: str
    http_version: str
    request_id: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.route}"

    def of_server(self) -> dict[str, Any]:
        return {
            "http.request.method": self.method,
            "http.route": self.route,
            "url.path": self.path,
            "url.scheme": self.scheme,
            "network.protocol.version": self.http_version,
            "qserve.request_id": self.request_id,
        }

    def of_send(self) -> dict[str, Any]:
        return _messaging(self.deployment, "send") | _what("", self.kind, self.durable)


def _facts(request: GatewayRequest) -> _Facts:
    scope = request.scope
    kind, method = ("http", scope["method"]) if scope["type"] == "http" else ("websocket", "GET")
    return _Facts(
        *(request.deployment, request.durable, kind, method, request.route_prefix, scope["path"], scope["scheme"]),
        *(scope["http_version"], request.request_id),
    )


class _LaterRequest(LaterSpans):
    """The spans of a request whose trace begins here: until they are sent, their ids and what they will say."""

    __slots__ = ("_end_ns", "_error", "_facts", "_ids", "_start_ns", "_status", "_tracer")

    def __init__(self, tracer: LaterTracer, request: GatewayRequest) -> None:
        self._tracer = tracer
        self._facts = _facts(request)
        self._start_ns = time.time_ns()
        self._ids = ids = f"{CHANCE.getrandbits(256):064x}"
        state, trace_id = request.scope["state"], ids[:32]
        request.meta["traceparent"] = f"00-{trace_id}-{ids[32:48]}-03"
        state["trace_id"] = trace_id
        state["traceresponse"] = f"00-{trace_id}-{ids[48:]}-03"

    def end(self, status: int, error: BaseException | None = None) -> None:
        """Hand them on."""
        self._end_ns = time.time_ns()
        self._status = status
        self._error = None if error is None else (type(error).__qualname__, str(error)[:500])  # without its traceback
        self._tracer.end(self)

    def made(self) -> list[ReadableSpan]:
        """The spans as the SDK has them."""
        trace_id, facts = int(self._ids[:32], 16), self._facts
        of_send, of_server = (
            trace.SpanContext(trace_id, int(each, 16), False, _KEPT) for each in (self._ids[32:48], self._ids[48:])
        )
        begins = trace.INVALID_SPAN_CONTEXT
        server = self._tracer.noted(facts.name, begins, of_server, SpanKind.SERVER, facts.of_server(), self._start_ns)
        send = self._tracer.noted(
            *(f"send {facts.deployment}", of_server, of_send, SpanKind.PRODUCER, facts.of_send(), self._start_ns)
        )
        _note_end(server, send, self._status, self._error)
        for span in (send, server):
            span.close(self._end_ns)
        return [server.made(), send.made()]


def _end_request(spans: tuple[Any, Any], status: int, error: BaseException | None = None) -> None:
    server, send = spans
    _note_end(server, send, status, None if error is None else (type(error).__qualname__, str(error)[:500]))
    send.end()
    server.end()


def _note_end(server: Any, send: Any, status: int, error: tuple[str, str] | None) -> None:
    if status:
        server.set_attribute("http.response.status_code", status)
    if error is None and status < 500:
        return
    what, text = error or (str(status), None)
    for span in (send, server):
        span.set_attribute("error.type", what)
        span.set_status(Status(StatusCode.ERROR, text))


class ReplicaSpans(ReplicaHook):
    """A span "process NAME" for each attempt of a call, under which those of user code hang."""

    needs_meta = True

    def wants(self, meta: Mapping[str, str]) -> bool:
        """Calls whose callers have traced them."""
        return "traceparent" in meta

    def before(self, call: ReplicaCall) -> Any:
        """Begin it, and make it the current span of user code."""
        sender, around = _told(call.meta)
        is_linked = call.durable and source().links
        links = [Link(sender)] if is_linked or call.attempt > 1 else []
        attributes = _messaging(call.deployment, "process") | _what(call.method, call.kind, call.durable)
        attributes |= {
            "messaging.message.id": call.call_id,
            "qserve.attempt": call.attempt,
            "qserve.queue_time_s": round(call.waited_s, 6),
            "qserve.replica": this_process().replica,
        }
        parent, beside = (trace.INVALID_SPAN_CONTEXT, _NOWHERE) if is_linked else (sender, around)
        span = _start(f"process {call.deployment}", SpanKind.CONSUMER, attributes, parent, beside, links)
        context.attach(trace.set_span_in_context(span, around))  # for as long as the call's own context
        return span

    def after(self, call: ReplicaCall, state: Any) -> None:
        """End it."""
        _end(state)

    def error(self, call: ReplicaCall, state: Any, error: BaseException) -> None:
        """End it with the error and its traceback."""
        state.record_exception(error)
        _end(state, error)


class BatchSpans(BatchHook):
    """A span "process NAME batch" for each batch of `@serve.batch` with traced calls in it, linked with them."""

    def joins(self, meta: dict[str, Any]) -> None:
        """Note the span of the call that joins."""
        meta["span"] = trace.get_current_span().get_span_context()

    def before(self, batch: Batch) -> Any:
        """Begin it, and make it the current span of the batch."""
        spans = [meta["span"] for meta in batch.calls]
        links = [Link(span) for span in spans if span.is_valid and span.trace_flags.sampled]
        if not links:
            context.attach(_NOWHERE)  # else it would count as the first call's
            return None
        attributes = _messaging(batch.deployment, "process")
        attributes |= {"qserve.method": batch.function, "messaging.batch.message_count": len(batch.calls)}
        span = _start(f"process {batch.deployment} batch", SpanKind.CONSUMER, attributes, links=links)
        context.attach(trace.set_span_in_context(span, _NOWHERE))
        return span

    def after(self, batch: Batch, state: Any) -> None:
        """End it."""
        if state is not None:
            _end(state)

    def error(self, batch: Batch, state: Any, error: BaseException) -> None:
        """End it with the error."""
        if state is not None:
            state.record_exception(error)
            _end(state, error)


def _messaging(deployment: str, operation: str) -> dict[str, Any]:
    return {
        "messaging.system": "qserve",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": deployment,
    }


def _what(method: str, kind: str, durable: bool) -> dict[str, Any]:
    return {"qserve.method": method or "__call__", "qserve.kind": kind, "qserve.durable": durable}


def _tell(meta: dict[str, str], span: Any, here: context.Context) -> None:
    if not span.is_recording():
        return  # the sampler of the user does not want it
    about = span.get_span_context()
    if about.trace_state or (here and baggage.get_all(here)):
        _W3C.inject(meta, context=trace.set_span_in_context(span, here))
    else:  # the same, in a tenth of the time
        meta["traceparent"] = f"00-{about.trace_id:032x}-{about.span_id:016x}-{about.trace_flags:02x}"


def _told(meta: Mapping[str, str]) -> tuple[trace.SpanContext, context.Context]:
    """What `_tell` has told: the span of the sender, and what was around it."""
    plain = None if "tracestate" in meta or "baggage" in meta else _PLAIN.fullmatch(meta["traceparent"])
    if plain is None:
        sent = _W3C.extract(meta, context=_NOWHERE)
        return trace.get_current_span(sent).get_span_context(), sent
    trace_id, span_id, flags = plain.groups()
    return trace.SpanContext(int(trace_id, 16), int(span_id, 16), True, trace.TraceFlags(int(flags, 16))), _NOWHERE


def _end(span: Any, error: BaseException | None = None) -> None:
    if error is not None:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(Status(StatusCode.ERROR, str(error)[:500]))
    span.end()


check()  # whoever names these hooks is told at the start
