"""What must become of a call when a process dies at a point: the rows of the failure table, a coroutine for each plot.

A row that does not hold raises AssertionError.
"""

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http.client import HTTPException

from qserve.wire.call_record import DurableOptions, Terms
from tests.faults.failpoints.stage import GHOST, LIMIT_S, NAME, Said, Stage, Victim
from tests.support.serving import free_port
from tests.support.slowness import patience
from tests.support.waiting import until

DIED, BROKEN, POISON = "ReplicaDied", "StreamBroken", "PoisonCall"
Play = Callable[[Stage, "Row"], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        call: "once" may not be run again, "safe" may, "durable" in any case; "large" and "safe-large" have large
            arguments; the result of "stream" comes in parts.
        runs: The attempts that user code sees, over all processes.
        or_runs: What they may be instead, where two things happen at once.
        error: How the call ends, "" with its result.
        state: Of the record or the deployment afterwards, where there is one.
        letters: Dead letters afterwards.
    """

    play: Play
    point: str
    call: str = ""
    runs: tuple[int, ...] = ()
    error: str = ""
    state: str = ""
    letters: int = 0
    or_runs: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.point} {self.call}".strip()


async def _put(stage: Stage, row: Row) -> Awaitable[Said]:
    if row.call == "durable":
        _, ended = await stage.submit()
        return ended
    if row.call == "stream":
        return stage.stream()
    ended = stage.call(safe="safe" in row.call, large="large" in row.call)
    # The call is queued before the one who is to die of it comes.
    await until(lambda: stage.redis.xlen(stage.keys.calls(NAME)) == 1)
    return ended


async def _check(stage: Stage, row: Row, ended: Awaitable[Said]) -> None:
    said = await ended
    await stage.quiet()
    name = "parts" if row.call == "stream" else "work"
    assert said.error == row.error, said
    runs = tuple(stage.runs(name))
    assert runs in (row.runs, row.or_runs or row.runs)
    if not row.error:
        assert said.value == ([0, 1, 2] if row.call == "stream" else ["work", runs[-1]])
    assert stage.letters() == row.letters
    if row.state:
        assert stage.records() == [row.state]
    assert stage.immortal() == [], stage.immortal()


async def replica_dies(stage: Stage, row: Row) -> None:
    """The replica that has the call dies; then another one comes."""
    ended = asyncio.ensure_future(await _put(stage, row))
    victim = stage.replica(f"{row.point}:1")
    await victim.died()
    async with stage.survivor():
        stage.bury(victim)
        await _check(stage, row, ended)
        await stage.forgotten(victim.id)


async def heir_dies(stage: Stage, row: Row, deliveries: int = 1) -> None:
    """A replica has died; the one that takes over its call dies of that; then a third one comes."""
    ended = await _put(stage, row)
    stage.haunt(deliveries)
    victim = stage.replica(f"{row.point}:1")
    await victim.died()
    async with stage.survivor():
        stage.bury(victim)
        await _check(stage, row, ended)
        await stage.forgotten(victim.id, GHOST)


async def undertaker_dies(stage: Stage, row: Row) -> None:
    """A call has killed three replicas; the one that is to give it up dies, too."""
    await heir_dies(stage, row, deliveries=3)


async def leaver_dies(stage: Stage, row: Row) -> None:
    """A replica that was told to leave dies before its goodbye."""
    ended = await _put(stage, row)
    victim = stage.replica(f"{row.point}:1")
    await _check(stage, row, ended)
    victim.process.terminate()
    await victim.died()
    again = stage.call()
    async with stage.survivor():
        stage.bury(victim)
        assert await again == Said(["work", 1])
        await stage.forgotten(victim.id)


async def mover_dies(stage: Stage, row: Row) -> None:
    """The replica that puts a delayed call on the queue dies."""
    _, ended = await stage.submit(options=DurableOptions(delay_s=0.2))
    victim = stage.replica(f"{row.point}:1")
    await victim.died()
    async with stage.survivor():
        stage.bury(victim)
        await _check(stage, row, ended)


async def caller_dies(stage: Stage, row: Row) -> None:
    """The process that calls dies; nobody else does."""
    async with stage.survivor():
        victim = stage.spawn("tests.faults.failpoints.victims", row.call, failpoint=f"{row.point}:1")
        await victim.died()
        if row.runs:
            await until(lambda: stage.runs(row.call if row.call != "submit" else "durable"), LIMIT_S)
        await stage.quiet()
        name = "durable" if row.call == "submit" else row.call
        await until(lambda: stage.records() == ([row.state] if row.state else []), LIMIT_S)
        assert tuple(stage.runs(name)) == row.runs
        assert stage.immortal() == [], stage.immortal()


async def canceller_dies(stage: Stage, row: Row) -> None:
    """Who cancels a delayed call dies."""
    call_id, _ = await stage.submit(options=DurableOptions(delay_s=3600))
    victim = stage.spawn("tests.faults.failpoints.victims", "cancel", call_id, failpoint=f"{row.point}:1")
    await victim.died()
    await until(lambda: stage.records() == [row.state])
    if row.state == "scheduled":
        stage.caller.client.durable.by_id.cancel(call_id)
        await until(lambda: stage.records() == ["cancelled"])


async def gateway_dies(stage: Stage, row: Row) -> None:
    """A gateway dies with the response in its hand: its client sees a broken connection."""
    port = free_port()
    async with stage.survivor():
        victim = stage.spawn("qserve_gateway", "--port", str(port), failpoint=f"{row.point}:1")
        await until(stage.state.observed.gateways, LIMIT_S)
        said = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/work")
        await victim.died()
        await stage.quiet()
        assert said == ""
        assert tuple(stage.runs("http")) == row.runs
        assert stage.immortal() == [], stage.immortal()


def _get(url: str) -> str:
    with contextlib.suppress(OSError, HTTPException), urllib.request.urlopen(url, timeout=patience(LIMIT_S)) as answer:
        return str(answer.status)
    return ""


async def worker_dies(stage: Stage, row: Row) -> None:
    """A replica dies, and so does its worker, which has to tell; the node starts another one."""
    node = stage.spawn("qserve_workers.node", failpoint=f"{row.point}:1")
    safe, once = stage.call("fragile", safe=True), stage.call("work")
    assert await safe == Said(["fragile", 2])
    said = await once
    assert said in (Said(["work", 1]), Said(None, DIED)), said
    await stage.quiet()
    assert stage.runs("fragile") == [1, 2]
    assert len(stage.runs("work")) <= 1
    assert f"failpoint {row.point}" in node.log.read_text()
    await _leave(node)


async def reader_dies(stage: Stage, row: Row) -> None:
    """The worker that reads Celery's queue dies, and another one comes."""
    task = await stage.send_task()
    command = ("celery", "-A", "qserve_workers", "worker", "-Q", "Nobody")
    victim = stage.spawn(*command, failpoint=f"{row.point}:1")
    await victim.died()
    async with stage.survivor():
        worker = stage.spawn(*command)
        ended = f"{stage.keys.celery_prefix}celery-task-meta-{task}"
        await until(lambda: stage.redis.exists(ended), LIMIT_S)
        await until(lambda: not stage.redis.exists(f"{stage.keys.celery_prefix}qserve"), LIMIT_S)
        await stage.quiet()
        assert tuple(stage.runs("work")) == row.runs
        assert stage.records() == [row.state]
        assert json.loads(str(stage.redis.get(ended), "utf-8"))["status"] == "SUCCESS"  # type: ignore[arg-type]
        await _leave(worker)


async def node_dies(stage: Stage, row: Row) -> None:
    """A node dies while it starts its worker; the next node has one worker, and nobody else does."""
    ended = stage.call()
    victim = stage.spawn("qserve_workers.node", failpoint=f"{row.point}:1")
    await victim.died()
    assert stage.runs("work") == []
    node = stage.spawn("qserve_workers.node")
    assert await ended == Said(["work", 1])
    await until(lambda: len(stage.state.observed.replicas(NAME)) == 1, LIMIT_S)
    await _leave(node)


async def _leave(node: Victim) -> None:
    node.process.terminate()
    await node.ended()


async def driver_dies(stage: Stage, row: Row) -> None:
    """Who deploys dies: nothing of it is written, or all."""
    victim = stage.spawn("tests.faults.failpoints.victims", "deploy", str(stage.folder), failpoint=f"{row.point}:1")
    await victim.died()
    deployed = stage.state.get(NAME)
    assert deployed is not None
    assert f"{deployed.generation} {deployed.spec.revision}" == row.state
    assert int(stage.redis.xlen(stage.keys.log)) == deployed.generation


async def reviver_dies(stage: Stage, row: Row) -> None:
    """Who sends a dead letter again dies: it is still there, or it is queued, and never both."""
    call_id, ended = await stage.submit("locked", DurableOptions(terms=Terms(retries=1, backoff_s=0.0)))
    async with stage.survivor():
        assert (await ended).error == "ValueError"
        await stage.quiet()
        (stage.folder / "gate").touch()
        victim = stage.spawn("qserve.cli", "dead", "retry", NAME, call_id, failpoint=f"{row.point}:1")
        await victim.died()
        await until(lambda: stage.records() == [row.state], LIMIT_S)
        await stage.quiet()
    assert stage.letters() == row.letters
    assert tuple(stage.runs("locked")) == row.runs


ROWS = (
    Row(replica_dies, "taken", "once", (), DIED),
    Row(replica_dies, "taken", "safe", (2,)),
    Row(replica_dies, "taken", "durable", (1,), state="done"),
    Row(replica_dies, "taken", "stream", (), DIED),
    Row(replica_dies, "payload-fetched", "large", (), DIED),
    Row(replica_dies, "payload-fetched", "safe-large", (2,)),
    Row(replica_dies, "run", "once", (), DIED),
    Row(replica_dies, "run", "safe", (2,)),
    Row(replica_dies, "ran", "once", (1,), DIED),
    Row(replica_dies, "ran", "safe", (1, 2)),
    Row(replica_dies, "reply", "once", (1,), DIED),
    Row(replica_dies, "reply", "safe", (1, 2)),
    Row(replica_dies, "reply-sent", "once", (1,)),
    Row(replica_dies, "reply-sent", "safe", (1,)),
    Row(replica_dies, "replied", "once", (1,)),
    Row(replica_dies, "chunk", "stream", (1,), DIED),
    Row(replica_dies, "chunk-sent", "stream", (1,), DIED),
    Row(replica_dies, "beat", "once", (1,)),
    Row(replica_dies, "run-noted", "durable", (2,), state="done"),
    Row(replica_dies, "settle", "durable", (1, 2), state="done"),
    Row(replica_dies, "settle-sent", "durable", (1,), state="done"),
    Row(replica_dies, "settled", "durable", (1,), state="done"),
    Row(heir_dies, "take", "once", (), DIED),
    Row(heir_dies, "take", "safe", (2,)),
    Row(heir_dies, "took", "once", (), DIED),
    Row(heir_dies, "took", "safe", (2,)),
    Row(heir_dies, "retire", "once", (), DIED),
    Row(heir_dies, "note-start", "safe", (2,)),
    Row(heir_dies, "start-noted", "safe", (3,)),
    Row(undertaker_dies, "bury", "safe", (), POISON, letters=1),
    Row(undertaker_dies, "buried", "safe", (), POISON, letters=1),
    Row(leaver_dies, "leave", "once", (1,)),
    Row(mover_dies, "due", "durable", (1,), state="done"),
    # Who has moved it may have been given it, too, and have begun.
    Row(mover_dies, "moved", "durable", (1,), state="done", or_runs=(2,)),
    Row(caller_dies, "admit", "work"),
    Row(caller_dies, "admit-sent", "work", (1,)),
    Row(caller_dies, "admitted", "work", (1,)),
    Row(caller_dies, "result-announced", "large", (1,)),
    Row(caller_dies, "chunk-arrived", "parts", (1,)),
    Row(caller_dies, "submit", "submit"),
    Row(caller_dies, "submit-sent", "submit", (1,), state="done"),
    Row(caller_dies, "submitted", "submit", (1,), state="done"),
    Row(canceller_dies, "end-call", "cancel", state="scheduled"),
    Row(canceller_dies, "end-call-sent", "cancel", state="cancelled"),
    Row(gateway_dies, "respond", "http", (1,)),
    Row(worker_dies, "tombstone"),
    Row(worker_dies, "tombstone-set"),
    Row(reader_dies, "celery-read", "durable", (1,), state="done"),
    Row(reader_dies, "celery-taken", "durable", (1,), state="done"),
    Row(node_dies, "spawn"),
    Row(node_dies, "spawned"),
    Row(driver_dies, "deploy", state="1 1"),
    Row(driver_dies, "deployed", state="2 2"),
    Row(reviver_dies, "revive", "durable", (1, 2), state="dead", letters=1),
    Row(reviver_dies, "revived", "durable", (1, 2, 3), state="done"),
)
