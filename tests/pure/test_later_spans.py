"""Spans that the SDK makes when they are sent: they are what it would have made at once."""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="qserve[otel] is not installed")

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from qserve.telemetry.later_spans import LaterSpan, LaterTracer, MakingExporter

RESOURCE = Resource({"service.name": "shop"})
LINK = trace.Link(trace.SpanContext(5, 6, is_remote=True))
PARENT = trace.SpanContext(
    *(0xAF7651916CD43DD8, 0xB7AD6B71, True, trace.TraceFlags(1)), trace_state=trace.TraceState([("vendor", "x")])
)


class Sent:
    """Spans of both kinds, and what is sent of them."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(MakingExporter(self._exporter))
        provider = TracerProvider(ALWAYS_ON, RESOURCE)
        provider.add_span_processor(processor)
        self.at_once = provider.get_tracer("qserve", "1")
        self.later = LaterTracer(RESOURCE, "qserve", "1")
        self.later.add_processor(processor)

    def of(self, tracer: Any, tell: Callable[[Any], None], *, parent: bool) -> Any:
        about = {"a": 1, "b": ("x", "y")}
        above: Any = PARENT if parent else trace.INVALID_SPAN_CONTEXT
        if tracer is self.at_once:
            above = trace.set_span_in_context(trace.NonRecordingSpan(above), Context())
        span = tracer.start_span("send Echo", above, trace.SpanKind.PRODUCER, about, [LINK])
        tell(span)
        span.end()
        (sent,) = self._exporter.get_finished_spans()
        self._exporter.clear()
        return sent


@pytest.fixture
def sent() -> Sent:
    return Sent()


def nothing(_span: Any) -> None: ...


def attributes(span: Any) -> None:
    span.set_attribute("a", 2)
    span.set_attributes({"c": 3.5, "wrong": object()})  # the SDK says so, and leaves it out


def fails(span: Any) -> None:
    try:
        raise ValueError("the reason")
    except ValueError as exc:
        span.record_exception(exc)
        span.set_status(trace.Status(trace.StatusCode.ERROR, "failed"))
    span.set_attribute("after", True)


def everything_else(span: Any) -> None:
    span.add_event("found", {"n": 1}, 17)
    span.add_link(trace.SpanContext(7, 8, is_remote=True))
    span.update_name("another")


def events_of(span: Any) -> list[tuple[str, object]]:
    return [(event.name, (event.attributes or {}).get("exception.message")) for event in span.events]


@pytest.mark.parametrize("limit", ["", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT=1", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT=3"])
def test_limits_of_the_environment_hold(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit:
        monkeypatch.setenv(*limit.split("="))
    sent = Sent()

    def tell(span: Any) -> None:
        span.set_attribute("name", "a long one")

    expected, found = (sent.of(tracer, tell, parent=False) for tracer in (sent.at_once, sent.later))
    assert (dict(found.attributes), found.dropped_attributes) == (
        dict(expected.attributes),
        expected.dropped_attributes,
    )


@pytest.mark.parametrize("tell", [nothing, attributes, fails, everything_else])
@pytest.mark.parametrize("parent", [False, True])
def test_it_is_sent_as_a_span_of_the_sdk(sent: Sent, tell: Callable[[Any], None], parent: bool) -> None:
    expected, found = (sent.of(tracer, tell, parent=parent) for tracer in (sent.at_once, sent.later))
    for name in ("name", "kind", "parent", "attributes", "resource", "instrumentation_scope"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [link.context for link in found.links] == [link.context for link in expected.links]
    assert found.status.status_code == expected.status.status_code
    assert found.status.description == expected.status.description
    assert events_of(found) == events_of(expected)
    assert found.context.trace_flags == expected.context.trace_flags
    assert found.context.trace_state == expected.context.trace_state
    if parent:
        assert found.context.trace_id == PARENT.trace_id
    assert found.start_time <= found.end_time


def test_it_has_its_ids_and_times_from_the_beginning(sent: Sent) -> None:
    told: list[LaterSpan] = []
    found = sent.of(sent.later, told.append, parent=False)
    (span,) = told
    assert found.context == span.get_span_context()
    assert (found.start_time, found.context.is_valid) == (span.start_ns, True)


def test_what_has_ended_takes_nothing_more(sent: Sent) -> None:
    span = sent.later.start_span("call", trace.INVALID_SPAN_CONTEXT, trace.SpanKind.INTERNAL, {})
    assert span.is_recording()
    span.end(span.start_ns + 5)
    span.end()
    span.set_attribute("late", 1)
    assert not span.is_recording()
    made: Any = span.made()
    assert (made.end_time, dict(made.attributes)) == (span.start_ns + 5, {})


def test_a_list_that_changes_later_is_sent_as_it_was(sent: Sent) -> None:
    items = ["pear"]

    def tell(span: Any) -> None:
        span.set_attribute("items", items)
        items.append("fig")

    assert sent.of(sent.later, tell, parent=False).attributes["items"] == ("pear",)


def test_user_code_finds_in_it_what_spans_of_the_sdk_have(sent: Sent) -> None:
    span = sent.later.start_span("call", trace.INVALID_SPAN_CONTEXT, trace.SpanKind.INTERNAL, {"a": 1})
    with trace.use_span(span):
        here: Any = trace.get_current_span()
        here.set_attribute("b", 2)
        assert dict(here.attributes) == {"a": 1, "b": 2}
        here.set_attribute("c", 3)  # now that it was made
        assert dict(here.attributes)["c"] == 3
        child: Any = sent.at_once.start_span("child")
    assert child.parent == span.context
    with pytest.raises(AttributeError, match="colour"):
        _ = here.colour


def test_programs_that_seed_their_random_numbers_make_different_ids_and_miss_none(sent: Sent) -> None:
    ids = set()
    for _ in range(2):
        random.seed(42)
        before = random.getstate()
        span = sent.later.start_span("call", trace.INVALID_SPAN_CONTEXT, trace.SpanKind.INTERNAL, {})
        ids.add(span.context.trace_id)
        assert random.getstate() == before
    assert len(ids) == 2
