"""Spans that cost little while a call runs: OpenTelemetry's SDK makes them later, all of a batch one after the other.

Where one request in a hundred is traced, the SDK's code and data have left the caches of the processor each time, so
that a span takes several times as long as one behind the other. Until a span is sent it only notes what it is told.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags

from qserve.background import CHANCE

_PLAIN = frozenset({str, bool, int, float})
_RANDOM = 0x02
"""The flag of W3C Trace Context 2 for traces whose id is random."""


class LaterTracer:
    """Makes spans that are all kept. Thread-safe.

    Args:
        resource: What the spans come from.
        name, version: Of the code that makes them.
    """

    def __init__(self, resource: Resource, name: str, version: str) -> None:
        self._processors: list[SpanProcessor] = []
        self._ids = _GivenIds()
        provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self._ids)
        self._tracer = provider.get_tracer(name, version)
        self._resource = resource
        self._scope = InstrumentationScope(name, version)
        self._limits = SpanLimits()
        self.lock = threading.RLock()

    def add_processor(self, processor: SpanProcessor) -> None:
        """Hand the spans to a processor when they have ended; its exporter is a `MakingExporter`."""
        self._processors.append(processor)

    def start_span(
        self,
        name: str,
        parent: SpanContext,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: Sequence[Link] = (),
    ) -> "LaterSpan":
        """Begin a span.

        Args:
            parent: Of its parent, invalid where it has none.
            attributes: Belongs to the span from now on.
        """
        if parent.is_valid:
            flags = TraceFlags(TraceFlags.SAMPLED | (parent.trace_flags & _RANDOM))
            about = SpanContext(parent.trace_id, _random_id(64), False, flags, parent.trace_state)
        else:
            about = SpanContext(_random_id(128), _random_id(64), False, TraceFlags(TraceFlags.SAMPLED | _RANDOM))
        return LaterSpan(self, name, parent, about, kind, attributes, links)

    def noted(
        self,
        name: str,
        parent: SpanContext,
        context: SpanContext,
        kind: SpanKind,
        attributes: dict[str, Any],
        start_ns: int,
    ) -> "LaterSpan":
        """A span that has begun before."""
        return LaterSpan(self, name, parent, context, kind, attributes, (), start_ns)

    def make(self, span: "LaterSpan") -> Any:
        """The SDK's span; to be called with `lock` held."""
        self._ids.given = span.context
        context = trace.set_span_in_context(trace.NonRecordingSpan(span.parent), Context())
        return self._tracer.start_span(
            *(span.name, context, span.kind, span.noted, span.links), start_time=span.start_ns
        )

    def read(self, span: "LaterSpan", end_ns: int) -> ReadableSpan | None:
        """What the SDK's span would say of one that has ended, at a tenth of its cost; None where limits touch it."""
        limits = self._limits
        many = len(span.noted) > limits.max_span_attributes or len(span.links) > limits.max_links
        if many or limits.max_span_attribute_length is not None:
            return None
        return ReadableSpan(
            *(span.name, span.context, span.parent if span.parent.is_valid else None, self._resource, span.noted),
            *((), span.links, span.kind),
            start_time=span.start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )

    def end(self, span: "LaterSpan | LaterSpans") -> None:
        """Hand on a span that has ended, or several."""
        processed: Any = span
        for processor in self._processors:
            processor.on_end(processed)


class LaterSpan(trace.Span):
    """A span that notes attributes, and becomes one of the SDK when it is sent, or told anything else. Thread-safe.

    Whatever else spans of the SDK have, this one has, too.
    """

    def __init__(
        self,
        tracer: LaterTracer,
        name: str,
        parent: SpanContext,
        context: SpanContext,
        kind: SpanKind,
        noted: dict[str, Any],
        links: Sequence[Link],
        start_ns: int = 0,
    ) -> None:
        self._tracer = tracer
        self._made: Any = None
        self._end_ns: int | None = None
        self.name = name
        self.parent = parent
        self.context = context
        self.kind = kind
        self.noted = noted
        self.links = links
        self.start_ns = start_ns or time.time_ns()

    def get_span_context(self) -> SpanContext:
        """Its ids."""
        return self.context

    def is_recording(self) -> bool:
        """Whether it has not ended."""
        return self._end_ns is None

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set several attributes."""
        with self._tracer.lock:
            if self._end_ns is not None:
                return
            if self._made is None and all(type(value) in _PLAIN for value in attributes.values()):
                self.noted.update(attributes)
            else:  # which copies what may change until it is sent
                self._sdk_span().set_attributes(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute."""
        self.set_attributes({key: value})

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Add an event."""
        self._sdk_span().add_event(name, attributes, timestamp)

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """Add a link."""
        self._sdk_span().add_link(context, attributes)

    def update_name(self, name: str) -> None:
        """Give it another name."""
        self._sdk_span().update_name(name)
        self.name = name

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Set its status."""
        self._sdk_span().set_status(status, description)

    def record_exception(
        self, exception: BaseException, attributes: Any = None, timestamp: int | None = None, escaped: bool = False
    ) -> None:
        """Add an exception as an event."""
        self._sdk_span().record_exception(exception, attributes, timestamp, escaped)

    def end(self, end_time: int | None = None) -> None:
        """End it; it takes nothing more then."""
        if self.close(end_time or time.time_ns()):
            self._tracer.end(self)

    def close(self, end_ns: int) -> bool:
        """End it without handing it on; False if it has ended already."""
        with self._tracer.lock:
            if self._end_ns is not None:
                return False
            self._end_ns = end_ns
            if self._made is not None:
                self._made.end(end_ns)
            return True

    def made(self) -> ReadableSpan:
        """The same span as the SDK has them."""
        with self._tracer.lock:
            if self._made is None and self._end_ns is not None:
                self._made = self._tracer.read(self, self._end_ns)
            span: ReadableSpan = self._sdk_span()
            return span

    def _sdk_span(self) -> Any:
        with self._tracer.lock:
            if self._made is None:
                self._made = self._tracer.make(self)
                if self._end_ns is not None:
                    self._made.end(self._end_ns)
            return self._made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sdk_span(), name)


class LaterSpans:
    """Spans that have ended, of which not even attributes were noted yet."""

    __slots__ = ()

    context = SpanContext(1, 1, False, TraceFlags(TraceFlags.SAMPLED))
    """What processors look at: they are all kept."""

    def made(self) -> list[ReadableSpan]:
        """The spans as the SDK has them."""
        raise NotImplementedError


class MakingExporter(SpanExporter):
    """Sends spans with another exporter, after those that are not made yet were made."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them."""
        made: list[ReadableSpan] = []
        for span in spans:
            if isinstance(span, LaterSpans):
                made += span.made()
            else:
                made.append(span.made() if isinstance(span, LaterSpan) else span)
        return self._exporter.export(made)

    def shutdown(self) -> None:
        """As the other exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """As the other exporter."""
        return self._exporter.force_flush(timeout_millis)


class _GivenIds(IdGenerator):
    """The ids that a span was given when it began."""

    given: SpanContext

    def generate_span_id(self) -> int:
        return self.given.span_id

    def generate_trace_id(self) -> int:
        return self.given.trace_id

    def is_trace_id_random(self) -> bool:
        return True


def _random_id(bits: int) -> int:
    return CHANCE.getrandbits(bits) or _random_id(bits)
