"""The scripts behind every call: what they let in, hand out, answer, take over and forget.

Each test runs against a real server and against fakeredis, which needs none.
"""

from collections.abc import Iterator
from typing import Any, cast

import fakeredis
import pytest
import redis

from qserve.broker.instance import remains
from qserve.broker.instance.heartbeats import DIED, LEFT, leave, post_tombstone
from qserve.broker.instance.remains import fail_remaining, remaining
from qserve.broker.keys import GROUP
from qserve.broker.scripts import ADMIT, BEAT, FIND, PRESENT, REPLY, TAKE, TELL, TRIM
from qserve.settings import Settings
from qserve.wire.messages import CONTROL, ERROR, PYTHON, Call, Control, Signer, decode_control, decode_reply, encode
from qserve.wire.names import is_name
from tests.support.chosen_server import needs_one_server
from tests.support.echo_queue import ALIVE, BEATS, INBOX, KEYS, LETTERS, META, REPLICAS, STREAM, Queue


@pytest.fixture(params=["valkey", "fakeredis"])
def server(request: pytest.FixtureRequest) -> Iterator["redis.Redis"]:
    """An empty server, real or not."""
    if request.param == "valkey":
        yield request.getfixturevalue("redis_client")
    else:
        with fakeredis.FakeRedis(version=(7,)) as client:
            yield client


@pytest.fixture
def queue(server: "redis.Redis") -> Queue:
    """The queue of a deployment that takes ten calls."""
    queue = Queue(server)
    queue.deploy()
    return queue


class TestPutting:
    def test_calls_stand_in_the_queue_in_the_order_they_were_put(self, queue: Queue) -> None:
        depth, _, *entries = queue.put("a", "b", "c")

        assert depth == 0
        assert queue.read("A") == entries

    def test_exactly_as_many_calls_are_let_in_as_the_bound_says(self, queue: Queue) -> None:
        _, _, *entries = queue.put(*map(str, range(12)))

        assert [entry is not None for entry in entries] == [True] * 10 + [False] * 2
        assert queue.depth() == 10
        assert queue.put("one more") == [10, 0, None]

    @pytest.mark.parametrize(("due", "low"), [("abcd", "efg"), ("abcdefg", ""), ("", "abcdefg")])
    def test_durable_calls_that_wait_for_their_time_have_their_places(self, queue: Queue, due: str, low: str) -> None:
        for key, ids in ((KEYS.due("Echo"), due), (KEYS.low("Echo"), low)):
            if ids:
                queue.redis.zadd(key, dict.fromkeys(ids, 1e15))
        keys = (STREAM, META, KEYS.instance, KEYS.due("Echo"), KEYS.low("Echo"))

        depth, _, *entries = queue.run(ADMIT, keys, 0, *("id", "", "frame") * 4)

        assert depth == 7
        assert [entry is not None for entry in entries] == [True, True, True, False]

    def test_a_running_call_takes_a_place_until_it_is_answered(self, queue: Queue) -> None:
        queue.put(*map(str, range(10)))
        first, *_ = queue.read("A")
        assert queue.put("refused")[2] is None

        queue.reply((first, "done"))

        assert queue.put("accepted")[2] is not None

    def test_the_caller_is_told_whether_calls_may_run_again(self, queue: Queue) -> None:
        queue.redis.hset(META, "idempotent", "1")

        assert queue.put("a")[1] == 1

    def test_a_call_to_an_unknown_deployment_leaves_no_stream_behind(self, server: "redis.Redis") -> None:
        server.set(KEYS.instance, "one")
        assert Queue(server).put("a") == [-1]
        assert server.keys(f"{KEYS.base}*") == [KEYS.instance.encode()]

    def test_a_server_without_any_state_is_told_apart(self, server: "redis.Redis") -> None:
        assert Queue(server).put("a") == [-4]

    def test_nothing_is_put_after_its_time(self, queue: Queue) -> None:
        now: Any = queue.redis.time()
        call = ("a", "", "a")

        assert queue.run(ADMIT, (STREAM, META, KEYS.instance), now[0] * 1000 - 1, *call) == [-3]
        assert queue.run(ADMIT, (STREAM, META, KEYS.instance), (now[0] + 60) * 1000, *call)[0] == 0

    def test_calls_are_found_by_their_ids(self, queue: Queue) -> None:
        ids = [f"c{number}" for number in range(10)]
        _, _, *entries = queue.put(*ids)

        assert queue.run(FIND, (STREAM,), 60_000, "c3", "x", "c0") == [entries[3], None, entries[0]]

    def test_a_call_to_a_deployment_without_a_stream_leaves_none_behind(self, server: "redis.Redis") -> None:
        server.hset(META, "max_queued", 10)

        assert Queue(server).put("a") == [-1]
        assert server.keys(f"{KEYS.base}*") == [META.encode()]

    def test_a_deployment_that_failed_refuses_and_says_why(self, queue: Queue) -> None:
        queue.redis.hset(META, "refuse", "no model")

        assert queue.put("a", "b") == [-2, b"no model"]
        assert queue.depth() == 0

    def test_scripts_the_server_has_forgotten_are_loaded_again(self, queue: Queue) -> None:
        queue.put("a")
        queue.redis.script_flush()

        assert queue.put("b")[0] == 1

    @pytest.mark.parametrize("name", ["Echo", "a.b-c_1", "x" * 63])
    def test_a_name_that_can_stand_in_a_key_is_taken(self, name: str) -> None:
        assert is_name(name)

    @pytest.mark.parametrize("name", ["", "a:b", "{a}", "a b", "ä", "x" * 64, "a\n", "a*"])
    def test_any_other_name_is_refused(self, name: str) -> None:
        assert not is_name(name)


class TestAnswering:
    def test_an_answer_removes_the_call_and_reaches_the_inbox(self, queue: Queue) -> None:
        queue.put("a", "b")
        first, second = queue.read("A")

        assert queue.reply((first, "1"), (second, "2")) == 2

        assert queue.inbox() == [b"1", b"2"]
        assert (queue.depth(), queue.pending("A")) == (0, [])

    def test_the_first_finisher_wins(self, queue: Queue) -> None:
        queue.put("a")
        (entry,) = queue.read("A")

        assert queue.reply((entry, "first")) == 1
        assert queue.reply((entry, "second")) == 0
        assert queue.inbox() == [b"first"]

    def test_of_a_batch_only_the_first_answers_count(self, queue: Queue) -> None:
        queue.put("a", "b")
        first, second = queue.read("A")
        queue.reply((first, "1"))

        assert queue.reply((first, "late"), (second, "2")) == 1
        assert queue.inbox() == [b"1", b"2"]

    @pytest.mark.parametrize(("count", "size"), [(250, 10), (5, 40_000)])
    def test_many_or_large_answers_of_a_batch_arrive_in_order(self, queue: Queue, count: int, size: int) -> None:
        queue.redis.hset(META, "max_queued", count)
        queue.put(*map(str, range(count)))
        entries = queue.read("A", most=count)
        frames = [f"{number:0{size}}" for number in range(count)]

        assert queue.reply(*zip(entries, frames, strict=True)) == count

        assert queue.inbox() == [frame.encode() for frame in frames]
        assert (queue.depth(), queue.pending("A")) == (0, [])

    def test_a_call_nobody_was_given_cannot_be_answered(self, queue: Queue) -> None:
        _, _, entry = queue.put("a")

        assert queue.reply((entry, "forged")) == 0
        assert queue.depth() == 1

    def test_the_answer_to_a_caller_that_is_gone_is_dropped_and_the_call_too(self, queue: Queue) -> None:
        queue.put("a")
        queue.redis.delete(ALIVE)
        (entry,) = queue.read("A")

        assert queue.reply((entry, "1")) == 1
        assert (queue.depth(), queue.redis.exists(INBOX)) == (0, 0)

    def test_a_caller_that_seems_dead_is_given_time_if_there_is_some(self, queue: Queue) -> None:
        """It seems so to a server whose clock has jumped, until it says again that it lives."""
        queue.put("a")
        queue.redis.delete(ALIVE)
        (entry,) = queue.read("A")

        assert queue.run(REPLY, (STREAM, INBOX, ALIVE), GROUP, 60_000, "0", entry, "1") == -1
        assert queue.depth() == 1
        queue.run(PRESENT, (ALIVE, INBOX), 60_000, 60_000)
        assert queue.run(REPLY, (STREAM, INBOX, ALIVE), GROUP, 60_000, "0", entry, "1") == 1
        assert queue.inbox() == [b"1"]

    def test_an_inbox_stays_while_its_owner_lives(self, queue: Queue) -> None:
        """Ids of one made anew might be below those that were read."""
        queue.run(TELL, (INBOX, ALIVE), 10_000, "0", "hello")
        queue.run(PRESENT, (ALIVE, INBOX), 60_000, 60_000)
        assert queue.redis.pttl(INBOX) > 50_000

    def test_what_was_read_is_deleted_unless_the_inbox_is_another_one(self, queue: Queue) -> None:
        """A clock that was set back gives the messages of an inbox made anew ids below those that were read."""
        for entry in ("5-1", "5-2", "5-3"):
            queue.redis.xadd(INBOX, {"d": entry}, id=entry)
        assert queue.run(TRIM, (INBOX,), "5-2") == 1
        assert queue.inbox() == [b"5-3"]

        assert queue.run(TRIM, (INBOX,), "7-0") == 0
        assert queue.inbox() == [b"5-3"]

    def test_an_inbox_that_nobody_reads_does_not_stay(self, queue: Queue) -> None:
        queue.put("a")
        queue.reply((queue.read("A")[0], "1"))

        assert 0 < queue.redis.pttl(INBOX) <= 60_000

    def test_a_process_is_told_something_only_while_it_lives(self, queue: Queue) -> None:
        assert queue.run(TELL, (INBOX, ALIVE), 60_000, "0", "hello") == 1
        queue.redis.delete(ALIVE)
        assert queue.run(TELL, (INBOX, ALIVE), 60_000, "0", "anybody?") == 0
        assert queue.inbox() == [b"hello"]


class TestBeating:
    def test_every_beat_moves_the_counter(self, queue: Queue) -> None:
        queue.beat("A")
        queue.beat("A")

        assert queue.redis.hget(BEATS, "A") == b"2"

    def test_a_serving_replica_is_seen_by_callers_and_one_that_starts_is_not(self, queue: Queue) -> None:
        queue.beat("A", serving=False)
        assert queue.redis.hget(META, "last_seen") is None
        queue.beat("A")
        assert queue.redis.hget(META, "last_seen") is not None

    def test_a_beat_does_not_bring_a_deleted_deployment_back(self, server: "redis.Redis") -> None:
        Queue(server).beat("A")

        assert not server.exists(META)

    def test_a_replica_learns_which_calls_it_lost_and_does_not_steal_them_back(self, queue: Queue) -> None:
        queue.put("a", "b")
        first, second = queue.read("A", 1) + queue.read("A", 1)
        queue.beat("A")
        queue.take("A", "B", 1)

        assert queue.beat("A", first, second) == [first]
        assert (queue.pending("A"), queue.pending("B")) == ([second], [first])

    def test_a_replica_thought_dead_that_beats_again_counts_as_alive(self, queue: Queue) -> None:
        queue.die("A")
        queue.beat("A")

        assert queue.redis.hget(BEATS, "A") == b"1"


class TestTakingOver:
    def test_a_dead_replicas_calls_are_taken_and_that_counts_as_a_start(self, queue: Queue) -> None:
        queue.put("a", "b")
        first, second = queue.read("A")
        queue.die("A")

        assert queue.take("A", "B") == [(2, first), (2, second)]
        assert (queue.pending("A"), queue.pending("B")) == ([], [first, second])

    def test_nothing_is_taken_from_a_replica_that_has_beaten_since(self, queue: Queue) -> None:
        queue.put("a")
        queue.read("A")
        queue.beat("A")
        judged = queue.redis.hget(BEATS, "A") or b""
        queue.beat("A")

        assert queue.run(TAKE, (STREAM, BEATS), GROUP, "A", "B", 16, "0", judged) == []
        assert len(queue.pending("A")) == 1

    def test_what_a_leaving_replica_hands_back_was_not_started(self, queue: Queue) -> None:
        queue.put("a")
        (entry,) = queue.read("A")
        queue.redis.hset(BEATS, "A", LEFT)

        assert queue.take("A", "B") == [(1, entry)]

    def test_each_start_that_kills_a_replica_counts(self, queue: Queue) -> None:
        queue.put("a")
        (entry,) = queue.read("A")
        starts = []
        for dead, heir in (("A", "B"), ("B", "C"), ("C", "D")):
            queue.die(dead)
            starts += queue.take(dead, heir)
            assert queue.start(heir, entry)

        assert starts == [(2, entry), (3, entry), (4, entry)]

    def test_waiting_where_a_replica_dies_counts_for_nothing(self, queue: Queue) -> None:
        queue.put("poison", "innocent")
        poison, innocent = queue.read("A")
        for dead, heir in (("A", "B"), ("B", "C"), ("C", "D")):
            queue.die(dead)
            taken = queue.take(dead, heir)
            assert queue.start(heir, poison)

        assert taken == [(4, poison), (2, innocent)]

    def test_a_suspect_stays_one_when_it_is_handed_back(self, queue: Queue) -> None:
        queue.put("a", "b")
        first, second = queue.read("A")
        queue.die("A")
        queue.take("A", "B")
        queue.start("B", first)
        queue.redis.hset(BEATS, "B", LEFT)

        assert queue.take("B", "C") == [(2, first), (2, second)]
        queue.die("C")
        assert queue.take("C", "D") == [(2, first), (2, second)]  # neither was started there

    def test_a_call_taken_over_by_another_is_not_started(self, queue: Queue) -> None:
        queue.put("a")
        (entry,) = queue.read("A")
        queue.die("A")
        queue.take("A", "B")

        assert not queue.start("A", entry)
        assert queue.pending("B") == [entry]

    def test_one_that_does_not_serve_yet_takes_only_what_may_not_run_again(self, queue: Queue) -> None:
        queue.put("safe", flags="s")
        queue.put("unsafe")
        _, unsafe = queue.read("A")
        queue.die("A")

        assert queue.take("A", "B", up_to=0) == [(2, unsafe)]

    def test_one_that_does_not_serve_yet_leaves_what_never_started(self, queue: Queue) -> None:
        queue.put("unsafe")
        queue.read("A")
        queue.redis.hset(BEATS, "A", LEFT)

        assert queue.take("A", "B", up_to=0) == []

    def test_one_that_is_busy_leaves_what_has_been_in_two_deaths_to_others(self, queue: Queue) -> None:
        queue.put("twice", "once", flags="s")
        twice, once = queue.read("A")
        queue.die("A")
        queue.take("A", "B", 1)
        queue.start("B", twice)
        queue.die("B")

        assert queue.take("A", "C", up_to=2) == [(2, once)]
        assert queue.take("B", "C", up_to=2) == []
        assert queue.take("B", "C", up_to=3) == [(3, twice)]

    def test_no_more_is_taken_than_asked_for(self, queue: Queue) -> None:
        queue.put("a", "b", "c")
        queue.read("A")
        queue.die("A")

        assert len(queue.take("A", "B", 2)) == 2
        assert len(queue.pending("A")) == 1


class TestForgetting:
    def test_a_replica_with_calls_is_not_forgotten_and_they_are_not_lost(self, queue: Queue) -> None:
        queue.put("a")
        (entry,) = queue.read("A")
        queue.beat("A")

        assert not queue.retire("A")
        assert queue.pending("A") == [entry]
        assert queue.redis.hexists(BEATS, "A")

    def test_a_replica_without_calls_leaves_no_trace(self, queue: Queue) -> None:
        queue.put("a")
        queue.reply((queue.read("A")[0], "1"))
        queue.beat("A")
        queue.redis.hset(REPLICAS, "A", "info")

        assert queue.retire("A")
        assert queue.redis.xinfo_consumers(STREAM, GROUP) == []
        assert not queue.redis.exists(BEATS, REPLICAS)

    def test_a_replica_of_a_deleted_deployment_is_forgotten_too(self, server: "redis.Redis") -> None:
        queue = Queue(server)
        queue.beat("A")

        assert queue.retire("A")
        assert server.keys() == []

    def test_a_call_given_up_on_is_kept_among_the_dead_letters_and_answered_once(self, queue: Queue) -> None:
        queue.put("a")
        (entry,) = queue.read("A")

        assert queue.give_up(entry)
        assert not queue.give_up(entry)

        ((_, letter),) = cast("list[Any]", queue.redis.xrange(LETTERS))
        assert letter == {b"r": b"a", b"f": b"", b"d": b"a", b"err": b"too bad", b"src": entry}
        assert queue.inbox() == [b"error"]
        assert queue.depth() == 0

    def test_what_has_no_caller_to_trust_is_given_up_in_silence(self, queue: Queue) -> None:
        queue.put("a")

        assert queue.give_up(queue.read("A")[0], frame="")
        assert queue.inbox() == []

    def test_a_queued_call_is_withdrawn_and_a_running_one_tells_where(self, queue: Queue) -> None:
        _, _, running, queued = queue.put("a", "b")
        queue.read("A", 1)

        assert queue.cancel(queued) == 1
        assert queue.cancel(queued) == 0
        assert queue.cancel(running) == b"A"
        assert queue.depth() == 1


class TestBeyondMaxmemory:
    """Only a real server has a limit."""

    @pytest.fixture
    def full(self, redis_client: "redis.Redis") -> Iterator[Queue]:
        """A queue on a server that refuses to store more."""
        queue = Queue(redis_client)
        queue.deploy()
        queue.put("a", "b")
        queue.read("A")
        queue.beat("A")
        redis_client.config_set("maxmemory", 1)
        yield queue
        redis_client.config_set("maxmemory", 0)

    @needs_one_server
    def test_new_calls_are_refused(self, full: Queue) -> None:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            full.put("c")

    def test_running_calls_are_answered(self, full: Queue) -> None:
        first, second = full.pending("A")

        assert full.reply((first, "1"), (second, "2")) == 2
        assert full.inbox() == [b"1", b"2"]

    def test_replicas_still_beat_and_callers_stay_alive(self, full: Queue) -> None:
        full.beat("A")
        full.run(PRESENT, (ALIVE, INBOX), 60_000, 60_000)

        assert full.redis.hget(BEATS, "A") == b"2"

    def test_calls_of_a_dead_replica_are_taken_over_given_up_and_forgotten(self, full: Queue) -> None:
        first, second = full.pending("A")
        full.run(BEAT, (STREAM, BEATS, META), GROUP, "A", "0")

        assert len(full.take("A", "B")) == 2
        assert full.start("B", first)
        assert full.give_up(first)
        assert full.give_up(second)
        assert full.retire("A")


class TestNeighbours:
    def test_a_tombstone_calls_every_other_replica_to_look(
        self, redis_client: "redis.Redis", settings: Settings, signer: Signer
    ) -> None:
        for replica in ("A", "B"):
            redis_client.hset(BEATS, replica, "5")
            redis_client.set(KEYS.alive(replica), "1")

        post_tombstone(redis_client, KEYS, "Echo", "A", signer)

        assert redis_client.hget(BEATS, "A") == DIED.encode()
        assert not redis_client.exists(KEYS.inbox("A"))
        ((_, fields),) = cast("list[Any]", redis_client.xrange(KEYS.inbox("B")))
        told = decode_reply(signer.open(fields[b"d"]))
        assert (told.to, told.kind) == ("B", CONTROL)
        assert decode_control(told.payload) == Control("sweep")

    @pytest.mark.parametrize(("all_answered", "value"), [(True, LEFT), (False, DIED)])
    def test_a_leaving_replica_says_whether_all_it_started_is_answered(
        self, redis_client: "redis.Redis", all_answered: bool, value: str
    ) -> None:
        queue = Queue(redis_client)
        queue.deploy()
        queue.put("a")
        queue.read("A")

        assert not leave(redis_client, KEYS, "Echo", "A", all_answered=all_answered)
        assert redis_client.hget(BEATS, "A") == value.encode()

    def test_callers_of_a_deleted_deployment_are_told_and_frames_of_strangers_are_left(
        self, redis_client: "redis.Redis", signer: Signer
    ) -> None:
        queue = Queue(redis_client)
        queue.deploy()
        call = Call("caller0", "Echo", "caller", 1000, PYTHON, "", False, b"")
        redis_client.xadd(STREAM, {"r": "caller0", "f": "", "d": signer.seal(encode(call))})
        redis_client.xadd(STREAM, {"r": "x", "f": "", "d": b"no frame"})

        assert fail_remaining(redis_client, KEYS, "Echo", signer, b"gone") == 1

        reply = decode_reply(signer.open(queue.inbox()[0]))
        assert (reply.id, reply.kind, reply.payload) == ("caller0", ERROR, b"gone")

    def test_a_long_queue_is_read_in_parts_and_whole(
        self, redis_client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remains, "_PAGE", 2)
        put = [redis_client.xadd(STREAM, {"r": str(number)}) for number in range(5)]

        assert [entry for entry, _ in remaining(redis_client, STREAM)] == put
