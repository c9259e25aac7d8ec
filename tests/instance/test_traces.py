"""Traces of calls, as a collector gets them from gateway, replicas and a program with handles."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from qserve import ReplicaDied, serve
from qserve.testing import TestInstance, instance
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

trace = pytest.importorskip("opentelemetry.trace", reason="qserve[otel] is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
pytest.importorskip("opentelemetry.instrumentation.httpx")

from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from qserve.telemetry import tracing  # noqa: E402
from tests.support.otlp_receiver import Collector, Span, collector  # noqa: E402

CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SERVER, CLIENT, PRODUCER, CONSUMER = 2, 3, 4, 5


@serve.deployment(route_prefix="/outer")
class Outer:
    def __init__(self) -> None:
        self.inner: Any = serve.get_deployment("Inner").get_handle(sync=False)

    async def __call__(self, request: Request) -> str:
        from opentelemetry import trace

        with trace.get_tracer("shop").start_as_current_span("look up"):
            ref = await self.inner.remote(int(request.query_params["n"]))
            return str(await ref)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@serve.deployment(max_concurrent_queries=10, idempotent=True)
class Inner:
    def __init__(self) -> None:
        self.failed = False

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=5)
    async def double(self, numbers: list[int]) -> list[int]:
        return [2 * number for number in numbers]

    async def __call__(self, number: int) -> int:
        return 2 * number

    async def batched(self, number: int) -> int:
        return await self.double(number)

    async def die_once(self) -> int:
        attempt = serve.get_replica_context().attempt
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt

    async def once_more(self) -> str:
        if not self.failed:
            self.failed = True
            raise ValueError("not the first time")
        return "done"


@serve.deployment(route_prefix="/relay")
class Relay:
    """Calls another HTTP service, through a client with the usual instrumentation."""

    def __init__(self, url: str) -> None:
        from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

        HTTPXClientInstrumentor().instrument()
        self.url = url

    async def __call__(self) -> str:
        async with httpx.AsyncClient(timeout=60) as client:
            return (await client.get(f"{self.url}/outer?n=5")).text


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    with collector() as made:
        yield made


@pytest.fixture(scope="module")
def own_spans() -> InMemorySpanExporter:
    """What this process, a program with handles and a tracer of its own, has made."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture(scope="module")
def traced(collected: Collector, own_spans: InMemorySpanExporter) -> Iterator[TestInstance]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSERVE_TRACES", "1")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collected.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with instance() as running:
            Inner.deploy()
            Outer.deploy()
            Relay.deploy(running.url)
            yield running
    tracing.source.cache_clear()


def own_span(own_spans: InMemorySpanExporter, name: str) -> tuple[str, str]:
    """Trace and id of the last span of this process with that name."""
    span = [each for each in own_spans.get_finished_spans() if each.name == name][-1]
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def test_a_request_is_one_trace_through_all_processes(traced: TestInstance, collected: Collector) -> None:
    headers = {"traceparent": f"00-{CLIENT_TRACE}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
    answer = httpx.get(f"{traced.url}/outer?n=4", headers=headers, timeout=patience(LIMIT_S))
    assert answer.text == "8"

    collected.find(6, trace=CLIENT_TRACE)
    in_order = [("GET /outer", SERVER), ("send Outer", PRODUCER), ("process Outer", CONSUMER), ("look up", 1)]
    in_order += [("send Inner", PRODUCER), ("process Inner", CONSUMER)]
    parent = "b7ad6b7169203331"
    spans: list[Span] = []
    for name, kind in in_order:
        spans.append(collected.one(trace=CLIENT_TRACE, name=name, kind=kind))
        assert spans[-1].parent == parent, name
        parent = spans[-1].id
    assert [span.service for span in spans] == ["qserve-gateway"] * 2 + ["Outer"] * 3 + ["Inner"]
    assert spans[0].facts["http.response.status_code"] == 200
    assert spans[0].facts["qserve.request_id"] == "mine"
    assert answer.headers["traceresponse"] == f"00-{CLIENT_TRACE}-{spans[0].id}-01"
    facts = spans[2].facts
    assert facts["messaging.system"] == "qserve"
    assert facts["messaging.operation.name"] == facts["messaging.operation.type"] == "process"
    assert facts["messaging.destination.name"] == "Outer"
    assert facts["messaging.message.id"]
    assert 0 <= facts["qserve.queue_time_s"] < patience(LIMIT_S)
    assert facts["qserve.replica"].startswith("Outer#")


def test_what_a_call_asks_of_other_services_is_in_its_trace(traced: TestInstance, collected: Collector) -> None:
    headers = {"traceparent": f"00-{OTHER_TRACE}-b7ad6b7169203331-01"}
    assert httpx.get(f"{traced.url}/relay", headers=headers, timeout=patience(LIMIT_S)).text == "10"
    process = collected.one(trace=OTHER_TRACE, name="process Relay")
    asked = collected.one(trace=OTHER_TRACE, kind=CLIENT)
    assert asked.parent == process.id
    assert collected.one(trace=OTHER_TRACE, name="GET /outer").parent == asked.id


def test_a_client_that_keeps_no_trace_leaves_none(traced: TestInstance, collected: Collector) -> None:
    other = "1" * 32
    headers = {"traceparent": f"00-{other}-b7ad6b7169203331-00"}
    answer = httpx.get(f"{traced.url}/outer?n=4", headers=headers, timeout=patience(LIMIT_S))
    assert (answer.text, "traceresponse" in answer.headers) == ("8", False)
    Inner.get_handle().remote(1).result(patience(LIMIT_S))  # whose spans come later
    collected.find(1, name="process Inner")
    assert not [span for span in collected.spans if span.trace == other]


@pytest.mark.usefixtures("traced")
def test_a_call_of_a_program_is_in_the_programs_trace(collected: Collector, own_spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("program").start_as_current_span("program"):
        Inner.get_handle().remote(3).result(patience(LIMIT_S))
    trace_id, sent = own_span(own_spans, "send Inner")
    assert own_span(own_spans, "program")[0] == trace_id
    assert collected.one(trace=trace_id).parent == sent


@pytest.mark.usefixtures("traced")
def test_each_attempt_of_a_durable_call_is_a_trace_with_a_link(
    collected: Collector, own_spans: InMemorySpanExporter
) -> None:
    durable = Inner.get_handle().options(durable=True, retries=1, backoff=0.0)
    assert durable.once_more.remote().result(patience(LIMIT_S)) == "done"
    sent = own_span(own_spans, "send Inner")
    first, second = (span for span in collected.find(2, name="process Inner", links=[sent]))
    assert len({first.trace, second.trace, sent[0]}) == 3
    assert [first.facts["qserve.attempt"], second.facts["qserve.attempt"]] == [1, 2]
    assert (first.error, second.error) == (True, False)
    assert first.facts["error.type"] == "ValueError"


@pytest.mark.usefixtures("traced")
def test_a_batch_is_linked_with_its_calls(collected: Collector) -> None:
    handle = Inner.get_handle()
    refs = [handle.batched.remote(number) for number in (1, 2)]
    assert [ref.result(patience(LIMIT_S)) for ref in refs] == [2, 4]
    batch = collected.one(name="process Inner batch")
    assert batch.facts["messaging.batch.message_count"] == 2
    calls = [span for span in collected.find(2, name="process Inner") if span.facts["qserve.method"] == "batched"]
    assert sorted(batch.links) == sorted((span.trace, span.id) for span in calls)
    assert batch.parent == ""


@pytest.mark.usefixtures("traced")
def test_a_call_whose_replica_is_killed_has_its_error_in_the_trace(
    collected: Collector, own_spans: InMemorySpanExporter
) -> None:
    with pytest.raises(ReplicaDied):
        Outer.get_handle().die.remote().result(patience(LIMIT_S))
    span = [each for each in own_spans.get_finished_spans() if each.name == "send Outer"][-1]
    assert span.attributes["error.type"] == "ReplicaDied"
    assert not span.status.is_ok


@pytest.mark.usefixtures("traced")
def test_what_runs_again_is_in_the_trace_of_its_caller(collected: Collector, own_spans: InMemorySpanExporter) -> None:
    assert Inner.get_handle().die_once.remote().result(patience(LIMIT_S)) == 2
    sent = own_span(own_spans, "send Inner")
    again = collected.one(trace=sent[0], name="process Inner")
    assert (again.parent, again.links, again.facts["qserve.attempt"]) == (sent[1], [sent], 2)


@pytest.mark.usefixtures("traced")
def test_spans_of_a_replica_that_leaves_are_not_lost(collected: Collector, own_spans: InMemorySpanExporter) -> None:
    """The last test: Inner is gone afterwards."""
    Inner.get_handle().remote(5).result(patience(LIMIT_S))
    sent = own_span(own_spans, "send Inner")
    Inner.delete()
    assert collected.one(trace=sent[0], name="process Inner").parent == sent[1]
