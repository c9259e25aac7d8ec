"""The scripts behind durable calls: what they take, start, settle, move, end and send again, step by step."""

from typing import Any, cast

import pytest
import redis

from qserve.broker.keys import GROUP
from qserve.broker.scripts import (
    ATTACH,
    DUE,
    END_CALL,
    NOTE_PART,
    NOTE_PROGRESS,
    REJECT_CALL,
    REVIVE,
    RUN_AGAIN,
    RUN_CALL,
    SETTLE_CALL,
    SUBMIT,
)
from tests.support.chosen_server import needs_one_server
from tests.support.echo_queue import KEYS, LETTERS, META, STREAM, Queue

pytestmark = needs_one_server
DUE_SET, LOW, MOVER, BASE = KEYS.due("Echo"), KEYS.low("Echo"), KEYS.mover("Echo"), KEYS.base
DAY_MS = 86_400_000


class Durable(Queue):
    """The durable calls of deployment Echo, through the scripts."""

    def submit(
        self,
        *ids: str,
        delay: int = 0,
        expires: int = 0,
        low: bool = False,
        idem: str = "",
        body: str = "",
        waiter: str = "",
        ttl: Any = "",
        large: str = "",
        key: str = "",
    ) -> Any:
        made: list[Any] = []
        for id_ in ids:
            made += [id_, f"frame of {id_}", delay, expires, 0, "", waiter, "b" if low else "", idem, body, DAY_MS, ttl]
            made += ["", key, "", large]
        return self.run(SUBMIT, (STREAM, META, DUE_SET, LOW, KEYS.instance), BASE, "Echo", *made)

    def start_run(self, id_: str, replica: str, entry: bytes) -> list[Any]:
        found: list[Any] = self.run(RUN_CALL, (STREAM, KEYS.call(id_), KEYS.parts(id_)), GROUP, replica, entry)
        return found

    def settle(
        self,
        id_: str,
        entry: bytes,
        state: str = "done",
        keep: int = DAY_MS,
        error: str = "",
        stored_by: str = "",
        attempt: Any = "",
    ) -> int:
        names = (STREAM, LETTERS, DUE_SET)
        told = (state, f"{state} frame", keep, 60_000, error, 100, error, "", stored_by, attempt)
        return int(self.run(SETTLE_CALL, names, BASE, GROUP, entry, id_, *told))

    def end(self, id_: str, state: str = "cancelled") -> Any:
        return self.run(END_CALL, (KEYS.call(id_),), BASE, id_, GROUP, state, f"{state} frame", DAY_MS, 60_000)

    def move(self, replica: str = "A", *, anyway: bool = False, most: int = 256) -> list[Any]:
        arguments = (BASE, replica, 3000, most, "1" if anyway else "0", GROUP)
        found: list[Any] = self.run(DUE, (DUE_SET, STREAM, MOVER, LOW), *arguments)
        return found

    def reject(self, id_: str, entry: bytes) -> int:
        names = (STREAM, LETTERS, KEYS.call(id_))
        return int(self.run(REJECT_CALL, names, BASE, GROUP, entry, id_, "dead frame", DAY_MS, 60_000, "forged", 100))

    def part(self, id_: str, entry: bytes, index: int, attempt: int = 1) -> int:
        told = (BASE, entry, index, f"part {index}", "news", 60_000, attempt)
        return int(self.run(NOTE_PART, (KEYS.call(id_), KEYS.parts(id_)), *told))

    def field(self, id_: str, name: str) -> Any:
        return self.redis.hget(KEYS.call(id_), name)

    def state(self, id_: str) -> str:
        return cast("bytes", self.field(id_, "state")).decode()

    def running(self, id_: str, replica: str = "A", **options: Any) -> bytes:
        """A call that runs; returns its entry."""
        self.submit(id_, **options)
        entry, *_ = self.read(replica)
        assert self.start_run(id_, replica, entry)[0] == b"run"
        return entry

    def dead(self, id_: str) -> bytes:
        """A call that is dead; returns its letter."""
        self.settle(id_, self.running(id_, expires=60_000), "dead", error="too bad")
        letter, _ = cast("list[Any]", self.redis.xrange(LETTERS))[-1]
        return cast("bytes", letter)

    def revive(self, letter: bytes, id_: str) -> bytes:
        found: bytes = self.run(REVIVE, (LETTERS, STREAM, KEYS.call(id_), KEYS.payload(id_)), letter, id_)
        return found


@pytest.fixture
def calls(redis_client: "redis.Redis") -> Durable:
    """A deployment that takes ten calls."""
    calls = Durable(redis_client)
    calls.deploy()
    return calls


class TestSubmitting:
    def test_a_call_that_is_submitted_again_is_put_once(self, calls: Durable) -> None:
        """As whoever lost the answer does, and every scheduler but the first."""
        assert calls.submit("d1") == [0, b"queued"]
        assert calls.submit("d1") == [1, b"queued"]
        assert calls.depth() == 1

    def test_one_that_has_ended_is_not_put_again(self, calls: Durable) -> None:
        calls.settle("d1", calls.running("d1"))
        calls.submit("d1")
        assert (calls.state("d1"), calls.depth()) == ("done", 0)

    def test_of_many_submitted_together_only_as_many_are_let_in_as_there_is_room_for(self, calls: Durable) -> None:
        ids = [f"d{n}" for n in range(12)]
        assert calls.submit(*ids) == [0, *[b"queued"] * 10, None, None]
        assert not calls.redis.exists(KEYS.call("d11"))

    def test_a_deployment_that_failed_refuses_and_says_why(self, calls: Durable) -> None:
        calls.submit("known")
        calls.redis.hset(META, "refuse", "no model")
        for id_ in ("known", "new"):
            calls.redis.set(KEYS.payload(id_), "large")
        assert calls.submit("known", "new", large="1") == [-2, b"no model"]
        assert [calls.redis.exists(KEYS.payload(id_)) for id_ in ("known", "new")] == [1, 0]
        assert calls.depth() == 1

    def test_the_large_payload_of_a_call_that_finds_no_room_is_forgotten(self, calls: Durable) -> None:
        calls.submit(*[f"d{n}" for n in range(10)])
        calls.redis.set(KEYS.payload("one-more"), "large")
        assert calls.submit("one-more", large="1") == [10, None]
        assert not calls.redis.exists(KEYS.payload("one-more"))

    def test_of_the_calls_with_one_key_of_many_clients_the_last_hundred_are_found(self, calls: Durable) -> None:
        calls.redis.hset(META, "max_queued", 200)
        for number in range(105):
            calls.submit(f"d{number:03}", idem=str(number), body="b", key="order 17")
        named = KEYS.named("order 17")
        assert calls.redis.zcard(named) == 100
        assert calls.redis.zscore(named, "d104")

    @pytest.mark.parametrize("where", [{}, {"delay": 60_000}, {"low": True}])
    @pytest.mark.parametrize("more", [{}, {"delay": 60_000}, {"low": True}])
    def test_all_kinds_share_one_bound(self, calls: Durable, where: Any, more: Any) -> None:
        calls.submit(*[f"d{n}" for n in range(10)], **where)
        assert calls.submit("one-more", **more)[1] is None

    def test_an_idempotency_key_stands_for_one_call_and_one_body_for_a_day(self, calls: Durable) -> None:
        calls.submit("d1", idem="key", body="a")
        assert calls.submit("d2", idem="key", body="a") == [1, b"same:d1"]
        assert calls.submit("d3", idem="key", body="b") == [1, b"other:d1"]
        assert calls.depth() == 1
        assert DAY_MS - 60_000 < calls.redis.pttl(f"{BASE}idem:key") <= DAY_MS


class TestRunning:
    def test_an_expired_call_is_never_started(self, calls: Durable) -> None:
        calls.submit("d1", expires=60_000)
        calls.redis.hset(KEYS.call("d1"), "expires", 1)
        entry, *_ = calls.read("A")
        assert calls.start_run("d1", "A", entry) == [b"expired"]

    def test_who_lost_the_entry_does_not_run_the_call(self, calls: Durable) -> None:
        entry = calls.running("d1")
        calls.redis.xclaim(STREAM, GROUP, "B", 0, [entry])
        assert calls.start_run("d1", "A", entry) == [b"lost"]
        assert calls.start_run("d1", "B", entry)[:2] == [b"run", 2]

    def test_a_copy_of_an_entry_runs_nothing_and_goes(self, calls: Durable) -> None:
        own = calls.running("d1")
        calls.redis.xadd(STREAM, {"r": "d1", "f": "sd", "d": "frame of d1"})
        copy, *_ = calls.read("B")
        assert calls.start_run("d1", "B", copy) == [b"gone"]
        assert [entry for entry, _ in cast("list[Any]", calls.redis.xrange(STREAM))] == [own]

    def test_what_has_ended_or_was_cancelled_does_not_start(self, calls: Durable) -> None:
        calls.submit("d1")
        entry, *_ = calls.read("A")
        assert calls.end("d1") == b"later"
        assert calls.start_run("d1", "A", entry) == [b"cancelled", b"cancelled frame"]
        calls.settle("d1", entry, "cancelled")
        calls.redis.xadd(STREAM, {"r": "d1", "f": "sd", "d": "x"}, id="*")
        calls.redis.hset(KEYS.call("d1"), "entry", (again := calls.read("A")[0]))
        calls.redis.hdel(KEYS.call("d1"), "cancel")
        assert calls.start_run("d1", "A", again) == [b"gone"]

    def test_a_running_call_that_is_cancelled_does_not_run_again(self, calls: Durable) -> None:
        entry = calls.running("d1")
        assert calls.end("d1") == [b"A", entry, b"Echo"]
        calls.redis.xclaim(STREAM, GROUP, "B", 0, [entry])
        assert calls.start_run("d1", "B", entry) == [b"cancelled", b"cancelled frame"]


class TestSettling:
    def test_the_first_to_settle_a_call_wins(self, calls: Durable) -> None:
        entry = calls.running("d1")
        assert [calls.settle("d1", entry), calls.settle("d1", entry, "failed")] == [1, 0]
        assert (calls.state("d1"), calls.field("d1", "result")) == ("done", b"done frame")

    def test_a_late_failure_does_not_put_what_has_ended_on_the_queue(self, calls: Durable) -> None:
        entry = calls.running("d1")
        calls.settle("d1", entry)
        assert calls.settle("d1", entry, "scheduled", 0) == 0
        assert (calls.state("d1"), calls.redis.zcard(DUE_SET)) == ("done", 0)

    def test_a_record_is_kept_for_as_long_as_is_said(self, calls: Durable) -> None:
        calls.settle("d1", calls.running("d1"), keep=5000)
        assert 0 < calls.redis.pttl(KEYS.call("d1")) <= 5000

    def test_a_call_is_found_in_lists_for_as_long_as_its_record_is_kept(self, calls: Durable) -> None:
        """Also where others end after it, whose records are kept for a shorter time."""
        calls.settle("d1", calls.running("d1"), keep=30 * DAY_MS)
        calls.settle("d2", calls.running("d2"), keep=DAY_MS)
        index = KEYS.index("Echo", "done")
        assert calls.redis.zrange(index, 0, -1) == [b"d1", b"d2"]
        assert calls.redis.pttl(index) > 29 * DAY_MS

    def test_a_failure_counts_and_the_call_waits_for_its_pause(self, calls: Durable) -> None:
        calls.settle("d1", calls.running("d1"), "scheduled", 60_000)
        assert calls.move()[1] == 0
        assert (calls.depth(), calls.state("d1")) == (0, "scheduled")
        calls.redis.zadd(DUE_SET, {"d1": 1})
        assert calls.move()[1] == 1
        entry, *_ = calls.read("B")
        assert calls.start_run("d1", "B", entry) == [b"run", 2, 1]

    def test_an_end_whose_large_result_was_not_stored_is_refused_until_it_is(self, calls: Durable) -> None:
        entry = calls.running("d1")
        with pytest.raises(redis.exceptions.ResponseError, match="could not be stored"):
            calls.settle("d1", entry, stored_by="A")
        assert calls.state("d1") == "running"
        calls.redis.set(KEYS.payload("d1:r:A"), "large", px=60_000)
        assert calls.settle("d1", entry, stored_by="A") == 1
        assert calls.state("d1") == "done"
        assert calls.redis.get(KEYS.payload("d1:r")) == b"large"
        assert DAY_MS - 60_000 < calls.redis.pttl(KEYS.payload("d1:r")) <= DAY_MS

    @pytest.mark.parametrize("has_parts", [False, True])
    def test_a_large_result_that_comes_late_does_not_take_the_place_of_the_first(
        self, calls: Durable, has_parts: bool
    ) -> None:
        entry = calls.running("d1")
        if has_parts:
            calls.part("d1", entry, 1)
        calls.redis.xclaim(STREAM, GROUP, "B", 0, [entry])
        calls.start_run("d1", "B", entry)
        for replica, attempt, first in (("B", 2, 1), ("A", 1, 0)):
            calls.redis.set(KEYS.payload(f"d1:r:{replica}"), f"large of {replica}")
            assert calls.settle("d1", entry, stored_by=replica, attempt=attempt) == first
        assert list(calls.redis.scan_iter(KEYS.payload("*"))) == [KEYS.payload("d1:r").encode()]
        assert calls.redis.get(KEYS.payload("d1:r")) == b"large of B"

    def test_one_that_was_cancelled_while_it_ran_and_failed_does_not_wait_for_its_pause(self, calls: Durable) -> None:
        entry = calls.running("d1")
        assert calls.end("d1") == [b"A", entry, b"Echo"]
        assert calls.settle("d1", entry, "scheduled", 600_000) == 1
        assert calls.move()[1] == 1
        entry, *_ = calls.read("A")
        assert calls.start_run("d1", "A", entry) == [b"cancelled", b"cancelled frame"]


class TestMoving:
    def test_only_who_holds_the_lease_moves_or_whoever_knows_of_a_call(self, calls: Durable) -> None:
        assert calls.move("A")[0] == b"1"
        calls.submit("d1", delay=60_000)
        calls.redis.zadd(DUE_SET, {"d1": 1})
        assert calls.move("B") == [b"0", 0, -1, 0]
        assert calls.move("B", anyway=True)[:2] == [b"0", 1]

    def test_what_was_cancelled_is_not_moved(self, calls: Durable) -> None:
        calls.submit("d1", delay=1)
        calls.end("d1")
        calls.redis.zadd(DUE_SET, {"d1": 1})
        assert (calls.move()[1], calls.depth(), calls.redis.zcard(DUE_SET)) == (0, 0, 0)

    def test_low_priority_waits_for_the_queue_and_keeps_its_order(self, calls: Durable) -> None:
        calls.submit("first")
        calls.submit("z", "m", "a", low=True)
        assert (calls.move()[1], calls.depth()) == (0, 1)
        calls.read("A")
        assert calls.move()[1] == 3
        order = [fields[b"r"] for _, fields in cast("list[Any]", calls.redis.xrange(STREAM))]
        assert order == [b"first", b"z", b"m", b"a"]


class TestEnding:
    def test_nobody_can_let_a_call_expire_before_its_time_or_while_it_runs(self, calls: Durable) -> None:
        calls.submit("d1", expires=60_000)
        calls.submit("d2")
        assert [calls.end("d1", "expired"), calls.end("d2", "expired")] == [b"later"] * 2
        calls.read("A")
        calls.running("d3", expires=60_000)
        calls.redis.hset(KEYS.call("d3"), "expires", 1)
        assert calls.end("d3", "expired") == b"later"

    def test_a_forged_entry_does_not_end_the_call_it_names(self, calls: Durable) -> None:
        own = calls.running("d1")
        calls.redis.xadd(STREAM, {"r": "d1", "f": "sd", "d": "forged"})
        forged, *_ = calls.read("B")
        assert calls.reject("d1", forged) == 1
        assert calls.state("d1") == "running"
        assert calls.settle("d1", own) == 1


class TestTelling:
    def test_a_part_or_progress_of_an_entry_that_was_lost_counts_for_nothing(self, calls: Durable) -> None:
        entry = calls.running("d1")
        assert [calls.part("d1", entry, 1), calls.part("d1", b"1-1", 2)] == [1, 0]
        told = (BASE, b"1-1", "frame", 60_000, 1)
        assert calls.run(NOTE_PROGRESS, (KEYS.call("d1"),), *told) == 0
        assert calls.redis.xlen(KEYS.parts("d1")) == 1

    def test_a_part_that_is_sent_again_stands_there_once(self, calls: Durable) -> None:
        entry = calls.running("d1")
        assert [calls.part("d1", entry, 1), calls.part("d1", entry, 1), calls.part("d1", entry, 2)] == [1, 1, 1]
        assert calls.redis.xlen(KEYS.parts("d1")) == 2

    def test_another_attempt_begins_its_parts_anew(self, calls: Durable) -> None:
        entry = calls.running("d1")
        calls.part("d1", entry, 1)
        calls.start_run("d1", "A", entry)
        assert calls.redis.xlen(KEYS.parts("d1")) == 0
        assert calls.part("d1", entry, 1, 2) == 1
        assert calls.redis.xlen(KEYS.parts("d1")) == 1

    def test_what_a_replica_that_was_thought_dead_still_says_counts_for_nothing(self, calls: Durable) -> None:
        """The entry is that of the attempt that has begun since, too."""
        entry = calls.running("d1")
        calls.part("d1", entry, 1)
        calls.redis.xclaim(STREAM, GROUP, "B", 0, [entry])
        calls.start_run("d1", "B", entry)
        calls.part("d1", entry, 1, attempt=2)
        assert calls.part("d1", entry, 2, attempt=1) == 0
        assert calls.run(NOTE_PROGRESS, (KEYS.call("d1"),), BASE, entry, "frame", 60_000, 1) == 0
        assert calls.settle("d1", entry, attempt=1) == 0
        assert (calls.state("d1"), calls.redis.xlen(KEYS.parts("d1"))) == ("running", 1)
        assert [calls.part("d1", entry, 2, attempt=2), calls.settle("d1", entry, attempt=2)] == [1, 1]

    @pytest.mark.parametrize(("state", "first"), [("done", 1), ("scheduled", 0)])
    def test_without_parts_its_end_counts_but_no_failure_that_is_tried_again(
        self, calls: Durable, state: str, first: int
    ) -> None:
        entry = calls.running("d1")
        calls.redis.xclaim(STREAM, GROUP, "B", 0, [entry])
        calls.start_run("d1", "B", entry)
        assert calls.settle("d1", entry, state, attempt=1) == first
        assert calls.settle("d1", entry, attempt=2) == 1 - first

    def test_all_who_wait_and_live_are_told(self, calls: Durable) -> None:
        calls.submit("d1", waiter="caller")
        calls.redis.set(KEYS.alive("other"), "1")
        calls.run(ATTACH, (KEYS.call("d1"),), BASE, "other")
        entry, *_ = calls.read("A")
        calls.start_run("d1", "A", entry)
        calls.settle("d1", entry)
        assert calls.inbox() == [b"done frame"]
        assert calls.redis.xlen(KEYS.inbox("other")) == 1


class TestSendingAgain:
    def test_a_dead_letter_is_sent_again_once_and_lasts_again(self, calls: Durable) -> None:
        calls.redis.set(KEYS.payload("d1"), "large")
        calls.redis.set(KEYS.payload("d1:r"), "large error")
        letter = calls.dead("d1")
        calls.redis.hset(KEYS.call("d1"), "failures", 3)
        assert calls.field("d1", "letter") == letter
        assert calls.revive(letter, "d1") == b"queued"
        assert calls.revive(letter, "d1") == b"absent"
        assert (calls.depth(), calls.redis.xlen(LETTERS)) == (1, 0)
        assert (calls.redis.ttl(KEYS.call("d1")), calls.redis.ttl(KEYS.payload("d1"))) == (-1, -1)
        assert [calls.field("d1", name) for name in ("expires", "failures", "letter", "result")] == [None] * 4
        assert not calls.redis.exists(KEYS.payload("d1:r"))

    def test_one_that_was_sent_again_already_is_not_put_twice(self, calls: Durable) -> None:
        letter = calls.dead("d1")
        copied = cast("list[Any]", calls.redis.xrange(LETTERS))[0][1]
        calls.revive(letter, "d1")
        other = cast("bytes", calls.redis.xadd(LETTERS, copied))
        assert calls.revive(other, "d1") == b"forgotten"
        assert calls.depth() == 1

    def test_only_what_has_failed_can_be_run_again(self, calls: Durable) -> None:
        def again() -> Any:
            return calls.run(RUN_AGAIN, (STREAM, KEYS.call("d1"), KEYS.payload("d1")), "d1")

        entry = calls.running("d1")
        assert again() == b"running"
        calls.redis.hset(KEYS.call("d1"), "failures", 3)
        calls.redis.set(KEYS.payload("d1:r"), "large error")
        calls.settle("d1", entry, "failed", error="x")
        assert [again(), again()] == [b"queued", b"running"]
        assert not calls.redis.exists(KEYS.payload("d1:r"))
        assert calls.field("d1", "failures") is None
        entry, *_ = calls.read("A")
        calls.start_run("d1", "A", entry)
        calls.settle("d1", entry)
        calls.redis.hset(KEYS.call("d1"), "again", "frame of d1")
        assert again() == b"ended"
