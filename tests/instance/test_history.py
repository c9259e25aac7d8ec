"""What is kept of calls: an index of durable ones, ordinary ones that had trouble, and counts of ten seconds each."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from qserve import serve
from qserve.broker.history.buckets import BOUNDS_MS, add_counts, read_buckets, sample_queues
from qserve.broker.history.call_index import ABOVE_ALL, count_states, newest_ids, run_again, summaries
from qserve.broker.history.troubles import TROUBLES_KEPT, Trouble, note_troubles, read_troubles
from qserve.broker.instance.state import State
from qserve.errors import BackPressureError
from qserve.testing import TestInstance
from qserve.wire.messages import Signer
from tests.support.gates import Gate, Notes
from tests.support.processes import connect, read_until
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until


@pytest.fixture
def kept(qserve_instance: TestInstance) -> Iterator[State]:
    settings = qserve_instance.settings
    with closing(State(settings.redis_url, settings.keys, Signer(settings.secrets))) as state:
        yield state


def ids_in(state: State, name: str, call_state: str) -> list[str]:
    return [each for _, each in newest_ids(state.redis, state.keys, [(name, call_state)], ABOVE_ALL, 0, 10)]


def test_the_index_follows_durable_calls_through_their_states(kept: State, gate: Gate) -> None:
    path = str(gate._path)

    @serve.deployment(name="indexed")
    def work(what: str) -> str:
        import pathlib
        import time

        while what == "wait" and not pathlib.Path(path).exists():
            time.sleep(0.005)
        if what == "fail" and not pathlib.Path(path).exists():
            raise ValueError("no good")
        return what

    work.deploy()
    handle = work.get_handle().options(durable=True)
    failed = handle.remote("fail")
    with pytest.raises(ValueError, match="no good"):
        failed.result(patience(LIMIT_S))
    waiting, queued = handle.remote("wait"), handle.remote("x")
    later = work.get_handle().options(durable=True, delay=3600).remote("later")
    wait_until(lambda: ids_in(kept, "indexed", "running") == [waiting.id])

    assert ids_in(kept, "indexed", "failed")[:1] == [failed.id]
    assert ids_in(kept, "indexed", "queued") == [queued.id]
    assert ids_in(kept, "indexed", "scheduled") == [later.id]
    found = summaries(kept.redis, kept.keys, [failed.id, "d" * 33])
    assert found.keys() == {failed.id}
    assert (found[failed.id].state, found[failed.id].error) == ("failed", "ValueError: no good")
    gate.open()
    assert (waiting.result(patience(LIMIT_S)), queued.result(patience(LIMIT_S))) == ("wait", "x")
    assert set(ids_in(kept, "indexed", "done")) >= {waiting.id, queued.id}
    assert (ids_in(kept, "indexed", "queued"), ids_in(kept, "indexed", "running")) == ([], [])

    # a call that has failed keeps its arguments, so that it can run again under its id
    assert run_again(kept.redis, kept.keys, "indexed", failed.id) == "queued"
    assert serve.get_ref(failed.id).result(patience(LIMIT_S)) == "fail"
    assert run_again(kept.redis, kept.keys, "indexed", failed.id) == "ended"
    later.cancel()
    wait_until(lambda: ids_in(kept, "indexed", "cancelled")[:1] == [later.id])
    assert count_states(kept.redis, kept.keys, ["indexed"])[0]["scheduled"] == 0


def test_ordinary_calls_that_fail_or_are_refused_are_noted(kept: State, gate: Gate) -> None:
    path = str(gate._path)

    @serve.deployment(name="troubled", max_queued_requests=2)
    def work(fail: bool) -> None:
        import pathlib
        import time

        if fail:
            raise ZeroDivisionError("secret of none")
        while not pathlib.Path(path).exists():
            time.sleep(0.005)

    work.deploy()
    handle = work.get_handle()
    with pytest.raises(ZeroDivisionError):
        handle.remote(True).result(patience(LIMIT_S))
    refs = [handle.remote(False) for _ in range(2)]
    with pytest.raises(BackPressureError):
        handle.remote(False).result(patience(LIMIT_S))

    def noted() -> dict[str, Trouble]:
        return {note.what: note for _, _, note in read_troubles(kept.redis, kept.keys, ["troubled"])}

    wait_until(lambda: noted().keys() >= {"failed", "refused"})
    assert noted()["failed"].error == "ZeroDivisionError: secret of none"
    assert "raise ZeroDivisionError" in noted()["failed"].traceback
    assert noted()["refused"].error.startswith("BackPressureError: the queue of 'troubled' is full")
    gate.open()
    for ref in refs:
        ref.result(patience(LIMIT_S))


def test_troubles_are_capped(state: State) -> None:
    for _ in range(3):
        note_troubles(state.redis, state.keys, "many", [Trouble("failed", error="x")] * 500)
    assert state.redis.xlen(state.keys.troubles("many")) == TROUBLES_KEPT


def test_counts_of_several_replicas_add_up(state: State) -> None:
    nothing = [0] * (len(BOUNDS_MS) + 1)
    fast, slow = nothing.copy(), nothing.copy()
    fast[3], slow[3], slow[7] = 2, 1, 1
    add_counts(state.redis, state.keys, "counted", {"done": 2}, fast, fast)
    add_counts(state.redis, state.keys, "counted", {"done": 1, "failed": 1}, nothing, slow)

    now, [found] = read_buckets(state.redis, state.keys, ["counted"], 60)

    ends: dict[str, int] = {}
    runs = [0] * len(nothing)
    for bucket in found:  # one, unless ten seconds began between the two
        for name, count in zip(bucket.ends[::2], bucket.ends[1::2], strict=True):
            ends[str(name)] = ends.get(str(name), 0) + int(count)
        for place, count in zip(bucket.runs[::2], bucket.runs[1::2], strict=True):
            runs[place] += count
    assert ends == {"done": 3, "failed": 1}
    assert (runs[3], runs[7]) == (3, 1)
    assert abs(now - time.time()) < 60


def test_a_queue_is_looked_at_once_for_all_gateways_and_a_quiet_one_takes_no_room(state: State) -> None:
    stream = state.keys.calls("sampled")
    state.redis.xgroup_create(stream, "g", mkstream=True)
    sample_queues(state.redis, state.keys, "me", ["sampled"])
    for _ in range(3):
        state.redis.xadd(stream, {"r": "x"})
    sample_queues(state.redis, state.keys, "another", ["sampled"])  # the first still has its turn
    _, [before] = read_buckets(state.redis, state.keys, ["sampled"], 60)
    state.redis.delete(state.keys.sampler)
    sample_queues(state.redis, state.keys, "another", ["sampled"])

    _, [after] = read_buckets(state.redis, state.keys, ["sampled"], 60)

    assert [bucket.depth for bucket in before] == [0]
    assert (after[-1].depth, after[-1].waiting, sum(bucket.arrivals for bucket in after)) == (3, 3, 3)
    for _ in range(3):
        state.redis.delete(state.keys.sampler)
        sample_queues(state.redis, state.keys, "me", ["nothing-there"])
    assert state.redis.llen(state.keys.buckets("nothing-there")) == 1


def test_the_index_forgets_calls_whose_records_are_gone(state: State) -> None:
    key = state.keys.index("gone", "done")
    state.redis.zadd(key, {f"d{number:032x}": number for number in range(250)})
    sample_queues(state.redis, state.keys, "me", ["gone"])
    assert state.redis.zcard(key) == 0


def test_a_client_that_leaves_a_stream_is_no_failure(kept: State, qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def endless() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            try:
                while True:
                    yield "more\n"
                    await asyncio.sleep(0.01)
            finally:
                notes.add("closed")

        return StreamingResponse(lines())

    @app.get("/fails")
    def fail() -> None:
        raise ZeroDivisionError

    @serve.deployment(name="streamed")
    @serve.ingress(app)
    class Streamed:
        pass

    Streamed.deploy()

    with connect(qserve_instance, b"POST /streamed/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: 0\r\n\r\n") as connection:
        read_until(connection, b"more")
    notes.wait_for(1)
    assert httpx.get(f"{qserve_instance.url}/streamed/fails").status_code == 500

    def troubles() -> list[str]:
        return [
            note.error for _, _, note in read_troubles(kept.redis, kept.keys, ["streamed"]) if note.what == "failed"
        ]

    wait_until(lambda: "HTTP status 500" in troubles())
    assert troubles() == ["HTTP status 500"]
