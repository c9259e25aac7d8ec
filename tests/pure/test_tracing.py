"""Which calls are traced, and what is said where traces cannot be made."""

from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest

from qserve.errors import ConfigurationError
from qserve.hooks import Batch, GatewayRequest, ReplicaCall
from qserve.settings import Settings

pytest.importorskip("opentelemetry.sdk", reason="qserve[otel] is not installed")

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from qserve.telemetry import tracing
from qserve.telemetry.later_spans import LaterTracer, MakingExporter

HEADER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    yield
    tracing.source.cache_clear()


def decided_by(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(tracing, "source", lambda: tracing._Source(None, lambda: ratio > 0, links=True))
    monkeypatch.setattr(tracing.source, "cache_clear", lambda: None, raising=False)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_request_without_a_trace_begins_one_as_the_sampler_says(
    monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    decided_by(monkeypatch, ratio)
    assert tracing.GatewaySpans().wants({"headers": [(b"host", b"x")]}) == bool(ratio)
    assert tracing.ClientSpans().wants("Echo") == bool(ratio)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [(b"00", False), (b"01", True), (b"02", False), (b"03", True), (b"0f", True), (b"", False), (b"x", False)],
)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_flags_of_a_request_decide(
    monkeypatch: pytest.MonkeyPatch, flags: bytes, wanted: bool, ratio: float
) -> None:
    decided_by(monkeypatch, ratio)
    assert tracing.GatewaySpans().wants({"headers": [(b"traceparent", HEADER + flags)]}) == wanted


def test_a_replica_traces_what_its_callers_trace() -> None:
    spans = tracing.ReplicaSpans()
    assert spans.wants({"traceparent": HEADER.decode() + "01"})
    assert not spans.wants({"tenant": "x"})


@pytest.mark.parametrize(
    ("sampler", "ratio"),
    [
        ({}, 1.0),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, 0.0),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, 0.25),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"}, 1.0),
    ],
)
def test_the_samplers_of_opentelemetry(monkeypatch: pytest.MonkeyPatch, sampler: dict[str, str], ratio: float) -> None:
    for name, value in sampler.items():
        monkeypatch.setenv(name, value)
    assert tracing._ratio() == ratio


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "always_on, always_off or traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "often", "'often' is not a number"),
        ("OTEL_TRACES_EXPORTER", "zipkin2", "no package installed here has it"),
    ],
)
def test_what_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=says):
        tracing.check()


@pytest.mark.parametrize(
    ("durable", "links", "in_trace"), [(False, True, True), (True, True, False), (True, False, True)]
)
def test_durable_calls_are_linked_or_children(
    monkeypatch: pytest.MonkeyPatch, durable: bool, links: bool, in_trace: bool
) -> None:
    tracer = TracerProvider().get_tracer("test")
    monkeypatch.setattr(tracing, "source", lambda: tracing._Source(tracer, lambda: True, links))
    monkeypatch.setattr(tracing.source, "cache_clear", lambda: None, raising=False)
    meta = {"traceparent": HEADER.decode() + "01"}
    call = ReplicaCall("8f-1", "Echo", "", "call", 1, durable, meta, waited_s=0.25)
    span = copy_context().run(tracing.ReplicaSpans().before, call)
    assert (f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c") == in_trace
    assert [f"{link.context.span_id:016x}" for link in span.links] == ["b7ad6b7169203331"] * (durable and links)
    assert span.attributes["qserve.queue_time_s"] == 0.25


def test_traces_come_after_the_hooks_of_the_user() -> None:
    assert Settings(hooks="mine:Hook").hook_paths == "mine:Hook"
    paths = Settings(hooks="mine:Hook", traces=True).hook_paths.split(",")
    assert paths[0] == "mine:Hook"
    assert [path.partition(":")[2] for path in paths[1:]] == [
        "ClientSpans",
        "GatewaySpans",
        "ReplicaSpans",
        "BatchSpans",
    ]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that have ended."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(
        tracing, "source", lambda: tracing._Source(provider.get_tracer("test"), lambda: True, links=True)
    )
    monkeypatch.setattr(tracing.source, "cache_clear", lambda: None, raising=False)
    return exporter


def request() -> GatewayRequest:
    scope = {"type": "http", "method": "POST", "path": "/a/b", "scheme": "http", "http_version": "1.1"}
    headers = [(b"traceparent", HEADER + b"01"), (b"host", b"x")]
    return GatewayRequest("Echo", "id-1", scope | {"headers": headers, "state": {}}, route_prefix="/a")


@pytest.mark.parametrize(("status", "error_type"), [(200, None), (404, None), (500, "500"), (503, "503")])
def test_a_request_is_an_error_of_both_spans_from_500_on(
    ended: InMemorySpanExporter, status: int, error_type: str | None
) -> None:
    spans, asked = tracing.GatewaySpans(), request()
    spans.after(asked, spans.before(asked), status)
    send, server = ended.get_finished_spans()
    assert [send.name, server.name] == ["send Echo", "POST /a"]
    assert send.parent == server.context
    for span in (send, server):
        assert (span.attributes or {}).get("error.type") == error_type
        assert span.status.status_code == (trace.StatusCode.UNSET if error_type is None else trace.StatusCode.ERROR)
    assert (server.attributes or {})["http.response.status_code"] == status
    assert asked.scope["state"]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


def test_a_request_that_fails_ends_both_spans_with_the_error(ended: InMemorySpanExporter) -> None:
    spans, asked = tracing.GatewaySpans(), request()
    spans.error(asked, spans.before(asked), ConnectionError("the client has left"))
    send, server = ended.get_finished_spans()
    for span in (send, server):
        assert (span.attributes or {})["error.type"] == "ConnectionError"
        assert span.status.description == "the client has left"
    assert send.parent == server.context


def spans_of_a_new_trace(
    monkeypatch: pytest.MonkeyPatch, tracer: Any, exporter: InMemorySpanExporter, status: int, error: Exception | None
) -> tuple[GatewayRequest, dict[str, ReadableSpan]]:
    monkeypatch.setattr(tracing, "source", lambda: tracing._Source(tracer, lambda: True, links=True))
    monkeypatch.setattr(tracing.source, "cache_clear", lambda: None, raising=False)
    spans, asked = tracing.GatewaySpans(), request()
    asked.scope["headers"].pop(0)
    state = spans.before(asked)
    if error is None:
        spans.after(asked, state, status)
    else:
        spans.error(asked, state, error)
    return asked, {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize(
    ("status", "error"), [(200, None), (503, None), (0, ConnectionError("the client has left"))], ids=str
)
def test_what_a_request_is_told_to_be_later_is_what_it_would_be_at_once(
    monkeypatch: pytest.MonkeyPatch, status: int, error: Exception | None
) -> None:
    told, kept = InMemorySpanExporter(), InMemorySpanExporter()
    provider, later = TracerProvider(), LaterTracer(Resource({}), "qserve", "1")
    provider.add_span_processor(SimpleSpanProcessor(told))
    later.add_processor(SimpleSpanProcessor(MakingExporter(kept)))
    at_once = provider.get_tracer("test")
    _, expected = spans_of_a_new_trace(monkeypatch, at_once, told, status, error)
    asked, found = spans_of_a_new_trace(monkeypatch, later, kept, status, error)

    server, send = found["POST /a"], found["send Echo"]
    for span in (server, send):
        like = expected[span.name]
        assert (span.kind, dict(span.attributes or {})) == (like.kind, dict(like.attributes or {}))
        assert (span.status.status_code, span.status.description) == (like.status.status_code, like.status.description)
        assert (span.end_time or 0) >= (span.start_time or 0) > 0
    assert (server.parent, send.parent) == (None, server.context)
    assert send.context.trace_id == server.context.trace_id
    ids = f"00-{server.context.trace_id:032x}-"
    assert asked.meta["traceparent"] == f"{ids}{send.context.span_id:016x}-{send.context.trace_flags:02x}"
    assert asked.scope["state"]["traceresponse"] == f"{ids}{server.context.span_id:016x}-03"
    assert asked.scope["state"]["trace_id"] == ids[3:-1]


@pytest.mark.parametrize("error", [None, ValueError("of one in it")])
def test_a_batch_has_a_span_linked_with_those_of_its_calls(
    ended: InMemorySpanExporter, error: Exception | None
) -> None:
    hook, calls = tracing.BatchSpans(), list[dict[str, object]]()
    traced = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(1)))
    for call in (trace.INVALID_SPAN, traced):
        calls.append({})
        with trace.use_span(call):
            hook.joins(calls[-1])

    def run() -> bool:
        batch = Batch("Echo", "predict", calls)
        state = hook.before(batch)
        is_current = trace.get_current_span() is state
        if error is None:
            hook.after(batch, state)
        else:
            hook.error(batch, state, error)
        return is_current

    assert copy_context().run(run)
    (span,) = ended.get_finished_spans()
    assert span.name == "process Echo batch"
    assert [link.context.span_id for link in span.links] == [2]
    assert (span.attributes or {})["messaging.batch.message_count"] == 2
    assert [event.name for event in span.events] == ["exception"] * (error is not None)


def test_a_batch_of_calls_that_are_not_traced_has_no_span_and_belongs_to_no_other(ended: InMemorySpanExporter) -> None:
    hook, meta = tracing.BatchSpans(), dict[str, object]()
    hook.joins(meta)

    def run() -> trace.Span:
        other = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True))
        with trace.use_span(other):
            batch = Batch("Echo", "predict", [meta])
            state = hook.before(batch)
            hook.after(batch, state)
            hook.error(batch, state, ValueError())
            return trace.get_current_span()

    assert copy_context().run(run) is trace.INVALID_SPAN
    assert not ended.get_finished_spans()
