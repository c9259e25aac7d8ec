"""A collector of traces: takes what OTLP exporters send over HTTP, and keeps the spans."""

import contextlib
import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S


@dataclass
class Span:
    """A span as it has arrived; ids are hexadecimal."""

    name: str
    service: str
    trace: str
    id: str
    parent: str
    kind: int
    error: bool
    facts: dict[str, Any]
    links: list[tuple[str, str]]


@dataclass
class Collector:
    """What has arrived so far."""

    url: str
    spans: list[Span] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, body: bytes) -> None:
        """Keep the spans of one export."""
        request = ExportTraceServiceRequest.FromString(body)
        with self.arrived:
            for resource in request.resource_spans:
                service = _facts(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.spans += [_span(each, service) for each in scope.spans]
            self.arrived.notify_all()

    def find(self, count: int, **wanted: Any) -> list[Span]:
        """Wait for so many spans whose attributes of this class are as wanted."""
        with self.arrived:
            enough = self.arrived.wait_for(lambda: len(self._that_are(wanted)) >= count, patience(LIMIT_S))
            assert enough, f"no {count} spans with {wanted} among {[(it.name, it.trace) for it in self.spans]}"
            return self._that_are(wanted)

    def one(self, **wanted: Any) -> Span:
        """Wait for the only span that is as wanted."""
        (found,) = self.find(1, **wanted)
        return found

    def _that_are(self, wanted: dict[str, Any]) -> list[Span]:
        return [span for span in self.spans if all(getattr(span, name) == value for name, value in wanted.items())]


def _span(sent: Any, service: str) -> Span:
    return Span(
        name=sent.name,
        service=service,
        trace=sent.trace_id.hex(),
        id=sent.span_id.hex(),
        parent=sent.parent_span_id.hex(),
        kind=sent.kind,
        error=sent.status.code == 2,
        facts=_facts(sent.attributes),
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in sent.links],
    )


def _facts(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            made.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
