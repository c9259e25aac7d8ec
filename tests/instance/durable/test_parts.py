"""What generators yield in durable calls: seen as it comes, from any process, over HTTP too, after restarts."""

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import StreamingResponse

import qserve
from qserve import serve
from qserve.testing import TestInstance
from tests.support.chosen_server import client_of
from tests.support.gates import Gate, Notes
from tests.support.shell import elsewhere
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S


def events_of(http: httpx.Client, call_id: str, after: int = 0) -> list[tuple[int, str, dict[str, Any]]]:
    """(number, name, data) of the events of a call, until it has ended."""
    headers = {"Last-Event-ID": str(after)} if after else {}
    text = http.get(f"/-/calls/{call_id}/events", headers=headers).text
    lines = [[line for line in block.splitlines() if line[:1] != ":"] for block in text.split("\n\n")]
    blocks = [dict(line.split(": ", 1) for line in block) for block in lines]
    return [(int(it["id"]), it["event"], json.loads(it["data"])) for it in blocks if "event" in it]


@pytest.fixture
def counting(qserve_instance: TestInstance, gate: Gate, notes: Notes) -> serve.Deployment[Any]:
    """Yields 0, 1, and the rest once the gate is open."""

    @serve.deployment
    async def counting(count: int) -> AsyncIterator[int]:
        for number in range(count):
            if number == 2:
                notes.add("two")
                await gate.passed()
            if number == 4:
                serve.get_replica_context().report_progress("four")
            yield number

    counting.deploy()
    return counting


def test_what_is_yielded_is_seen_before_the_end_and_by_anyone(counting: Any, gate: Gate, notes: Notes) -> None:
    ref = counting.get_handle().options(durable=True).remote(150)
    iterated = iter(ref)

    assert [next(iterated), next(iterated)] == [0, 1]
    peek = f"i = iter(serve.get_ref({ref.id!r})); print(next(i), next(i))"
    assert elsewhere(peek) == "0 1"
    assert not ref.done()
    gate.open()
    assert list(iterated) == list(range(2, 150))
    assert ref.result(patience(LIMIT_S)) == list(range(150))
    assert elsewhere(f"print(sum(serve.get_ref({ref.id!r})))") == str(sum(range(150)))


async def test_asynchronous_code_iterates_too(counting: Any, gate: Gate) -> None:
    gate.open()
    ref = await counting.get_handle(sync=False).options(durable=True).remote(70)

    assert [number async for number in ref] == list(range(70))


def test_events_have_chunks_and_go_on_where_a_client_left_off(counting: Any, gate: Gate, http: httpx.Client) -> None:
    gate.open()
    ref = counting.get_handle().options(durable=True).remote(150)
    ref.result(patience(LIMIT_S))

    events = events_of(http, ref.id)

    names = [name for _, name, _ in events]
    assert [name for name in names if name != "chunk"] == ["queued", "started", "progress", "done"]
    assert names.index("progress") in (6, 7)
    assert names.count("chunk") == 150
    assert [number for number, _, _ in events] == list(range(1, 155))
    assert [data["chunk"] for _, name, data in events if name == "chunk"] == list(range(150))
    assert (events[2][2]["attempt"], events[2][2]["number"]) == (1, 1)
    assert events_of(http, ref.id, after=100) == events[100:]


def test_the_body_of_a_streamed_response_is_seen_as_it_comes(
    qserve_instance: TestInstance, gate: Gate, http: httpx.Client
) -> None:
    path = Path(gate._path)

    @serve.deployment
    async def words() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"first "
            await Gate(path).passed()
            yield b"\xff last"

        return StreamingResponse(body())

    words.deploy()
    location = http.get("/words", headers={"Prefer": "respond-async"}).headers["location"]
    with http.stream("GET", f"{location}/events") as events:
        for line in events.iter_lines():
            if line.startswith("data") and '"chunk":"first "' in line:
                gate.open()
            if line.startswith("event: done"):
                break

    assert http.get(location, params={"response": "true"}).content == b"first \xff last"
    chunks = [data for _, name, data in events_of(http, location.rpartition("/")[2]) if name == "chunk"]
    assert [chunk.get("chunk") or chunk["chunk_base64"] for chunk in chunks] == ["first ", "/yBsYXN0"]


def test_another_attempt_gives_its_parts_anew(
    qserve_instance: TestInstance, gate: Gate, notes: Notes, http: httpx.Client
) -> None:
    path = Path(gate._path)

    @serve.deployment
    def fragile() -> Iterator[str]:
        attempt = serve.get_replica_context().attempt
        for number in range(3):
            yield f"{attempt}.{number}"
        if attempt == 1:
            Gate(path).pass_through()
            os.kill(os.getpid(), signal.SIGKILL)

    fragile.deploy()
    ref = fragile.get_handle().options(durable=True).remote()
    iterated = iter(ref)
    assert [next(iterated) for _ in range(3)] == ["1.0", "1.1", "1.2"]
    gate.open()

    with pytest.raises(qserve.StreamBroken, match=r"attempt 1 .* after 3 parts"):
        list(iterated)

    assert list(ref) == ["2.0", "2.1", "2.2"]
    assert [data["attempt"] for _, name, data in events_of(http, ref.id) if name == "chunk"] == [2, 2, 2]


def test_what_a_call_gives_is_bounded_and_goes_with_its_record(qserve_instance: TestInstance) -> None:
    @serve.deployment
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(2_000_000)

    endless.deploy()
    ref = endless.get_handle().options(durable=True, result_ttl=50).remote()

    with pytest.raises(qserve.ResultTooLarge):
        list(ref)

    with client_of(qserve_instance.settings.redis_url) as redis:
        assert 0 < redis.ttl(qserve_instance.settings.keys.parts(ref.id)) <= 50
