"""Large values: lent on one host, sent where that is not possible, and nothing of them left behind."""

import asyncio
import errno
import hashlib
import mmap
import os
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy
import pytest

from qserve.broker.keys import Keys
from qserve.broker.large import transfers
from qserve.broker.large.lending import Lending, Loan
from qserve.broker.large.transfers import CHUNK, TransferBroken, Transfers
from qserve.errors import BrokerUnavailable, CallCancelled, FrameRejected, Indeterminate, PayloadTooLarge
from qserve.settings import Settings
from qserve.values import borrowing, segments
from qserve.values.borrowing import Borrowing, NotReachable, ValueGone
from qserve.wire.messages import Lent, Signer, decode_lent
from qserve.wire.parts import Parts
from tests.support.calling import Caller, Code, calling, deploy, serving, within
from tests.support.lender import lent_by_another_process
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, until

if TYPE_CHECKING:
    import redis

MIB = 2**20


@pytest.fixture
def keys(settings: Settings) -> Keys:
    """Those of the shard in which the deployment of these tests lies."""
    return settings.keys.of("Echo")


@pytest.fixture
async def both(settings: Settings) -> AsyncIterator[tuple[Caller, Code]]:
    """A caller and a replica."""
    spec = deploy(settings)
    async with calling(settings) as caller, serving(settings, spec) as (_, code):
        yield caller, code


@pytest.fixture
async def lending(settings: Settings, signer: Signer) -> AsyncIterator[Lending]:
    made = Lending("me", settings.keys.address(settings.redis_url), settings.keys, signer)
    yield made
    made.stop()


def digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def is_gone(loan: Loan) -> bool:
    try:
        Borrowing().open(decode_lent(loan.frame), returns=True)
    except (ValueGone, NotReachable):
        return True
    return False


def counted(client: "redis.Redis", keys: Keys, counter: str) -> int:
    return int(client.hget(keys.counters, counter) or 0)


class TestCalls:
    @pytest.mark.parametrize("way", ["lent", "sent"])
    async def test_values_arrive_whole_either_way(
        self,
        both: tuple[Caller, Code],
        redis_client: "redis.Redis",
        keys: Keys,
        way: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        caller, _ = both
        if way == "sent":
            # Arguments only: in this test the replica has no inbox that could be asked for results.
            real = Borrowing.open

            def open_results(self: Borrowing, lent: Lent, *, returns: bool, views: bool = False) -> Any:
                if not returns:
                    raise NotReachable
                return real(self, lent, returns=returns, views=views)

            monkeypatch.setattr(Borrowing, "open", open_results)
        for size in (300_000, MIB, 5 * MIB + 3, 24 * MIB):
            array = numpy.frombuffer(os.urandom(size), numpy.uint8)
            found = await caller.ask({"a": [array, b"x" * size], "b": array[::2]})
            assert digest(found["a"][0]) == digest(array)  # type: ignore[index]
            assert found["a"][1] == b"x" * size  # type: ignore[index]
            assert digest(numpy.ascontiguousarray(found["b"])) == digest(array[::2].copy())  # type: ignore[index]
        await until(lambda: counted(redis_client, keys, f"values_{way}") >= 4)
        assert redis_client.keys(keys.payload("*")) == []
        await until(lambda: redis_client.keys(keys.transfer("*", "[0-9]*")) == [])

    async def test_the_memory_of_a_call_is_used_again(self, both: tuple[Caller, Code]) -> None:
        caller, _ = both
        seen = set()
        for _ in range(5):
            pending, outcome = caller.call(b"x" * MIB)
            assert pending.loan is not None
            seen.add(pending.loan.segment.cookie)
            await within(outcome)
        assert len(seen) == 1

    @pytest.mark.parametrize("read_only", [False, True])
    async def test_arguments_are_views_where_the_deployment_wants_them(
        self, settings: Settings, read_only: bool
    ) -> None:
        spec = msgspec.structs.replace(deploy(settings), read_only_arguments=read_only)
        given = numpy.arange(MIB, dtype=numpy.int64)
        async with calling(settings) as caller, serving(settings, spec) as (_, code):
            for number in range(2):
                given[0] = number
                assert (caller.value(await within(caller.call(given)[1])) == given).all()
        assert [array.flags.writeable for array in code.started] == [not read_only] * 2
        assert [array[0] for array in code.started] == [0, 1], "the memory of a view was used for another value"

    async def test_the_memory_of_a_cancelled_call_is_not(self, settings: Settings) -> None:
        deploy(settings)
        async with calling(settings) as caller:
            first, _ = caller.call(b"x" * MIB)
            assert first.loan is not None
            cookie = first.loan.segment.cookie
            caller.client.cancel(first)
            second, _ = caller.call(b"y" * MIB)
            assert second.loan is not None
            assert second.loan.segment.cookie != cookie

    async def test_arguments_that_were_taken_back_end_their_call(self, settings: Settings) -> None:
        spec = deploy(settings)
        async with calling(settings) as caller:
            pending, outcome = caller.call(b"x" * MIB)
            assert pending.loan is not None
            caller.client.lending.end(pending.loan, is_read=True)
            caller.client.lending.lend(b"y" * MIB)
            async with serving(settings, spec) as (_, code):
                with pytest.raises(BrokerUnavailable, match=r"the call was not run: .* taken it back"):
                    caller.value(await within(outcome))
                assert code.started == []

    async def test_a_result_that_is_lost_is_indeterminate(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = deploy(settings)
        async with calling(settings) as caller, serving(settings, spec):

            async def gone(*_args: object, **_options: object) -> None:
                raise ValueGone("a large value was lost with the process that had it")

            pending, outcome = caller.call(b"x" * MIB)
            del pending
            monkeypatch.setattr(caller.client.lending, "borrow", gone)
            with pytest.raises(Indeterminate, match="the call has run, but its large result is lost"):
                caller.value(await within(outcome))

    async def test_a_safe_call_whose_results_are_lost_runs_three_times(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = deploy(settings)
        async with calling(settings) as caller, serving(settings, spec) as (_, code):

            async def gone(*_args: object, **_options: object) -> None:
                raise ValueGone("a large value was lost with the process that had it")

            monkeypatch.setattr(caller.client.of("Echo").lending, "borrow", gone)
            with pytest.raises(BrokerUnavailable, match="the call has run, but its large result is lost"):
                caller.value(await within(caller.call(b"x" * MIB, safe=True)[1]))
            assert len(code.started) == 3

            monkeypatch.setattr(caller.client.of("Echo")._reconciler.budget, "take", lambda _now: False)
            with pytest.raises(BrokerUnavailable, match="the call has run, but its large result is lost"):
                caller.value(await within(caller.call(b"x" * MIB, safe=True)[1]))
            assert len(code.started) == 4

    async def test_a_call_that_ended_while_its_result_was_fetched_is_not_sent_again(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        spec = deploy(settings)
        async with calling(settings) as caller, serving(settings, spec) as (_, code):
            fetching, let_go = asyncio.Event(), asyncio.Event()

            async def gone(*_args: object, **_options: object) -> None:
                fetching.set()
                await let_go.wait()
                raise ValueGone("a large value was lost with the process that had it")

            monkeypatch.setattr(caller.client.lending, "borrow", gone)
            pending, outcome = caller.call(b"x" * MIB, safe=True)
            await asyncio.wait_for(fetching.wait(), patience(LIMIT_S))
            caller.client.cancel(pending)
            let_go.set()
            with pytest.raises(CallCancelled):
                caller.value(await within(outcome))
            assert await caller.ask("next") == "next"
            assert len(code.started) == 2
        assert "background task failed" not in caplog.text


class TestLending:
    async def test_a_result_is_kept_until_it_is_copied_out(self, lending: Lending) -> None:
        loan = lending.lend_result(b"x" * MIB)
        lending.tick()
        found = Borrowing().open(decode_lent(loan.frame), returns=True)
        assert found.head == b"x" * MIB
        found.finish()

        lending.tick()

        assert lending.lend(b"y" * MIB).segment is loan.segment

    async def test_memory_of_a_larger_value_serves_smaller_ones(self, lending: Lending) -> None:
        large = lending.lend(b"x" * 3 * MIB)
        lending.end(large, is_read=True)
        assert lending.lend(b"y" * MIB).segment is large.segment
        assert lending.lend(b"z" * MIB).segment is not large.segment

    async def test_a_result_nobody_fetches_is_given_up(self, lending: Lending) -> None:
        loan = lending.lend_result(b"x" * MIB)
        loan.since -= 61
        lending.tick()
        await until(lambda: is_gone(loan))

    async def test_memory_is_given_up_where_it_holds_up_no_event_loop(
        self, lending: Lending, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: list[int] = []
        real = segments.Segment.close

        def close(self: segments.Segment) -> None:
            real(self)
            threads.append(threading.get_ident())

        monkeypatch.setattr(segments.Segment, "close", close)
        loan = lending.lend(Parts(b"", bytes(MIB)))
        lending.end(loan, is_read=False)
        await until(lambda: len(threads) == 1)
        assert threading.get_ident() not in threads

    @pytest.mark.parametrize("advice", [None, 9999])
    async def test_contents_are_whole_whether_pages_can_be_mapped_at_once_or_not(
        self, lending: Lending, monkeypatch: pytest.MonkeyPatch, advice: int | None
    ) -> None:
        if advice is not None:  # as on a Linux that does not know it
            monkeypatch.setattr(segments, "_POPULATE_READ", advice)
            monkeypatch.setattr(segments, "_POPULATE_WRITE", advice)
        for _ in range(2):  # into fresh memory, and over it
            data = os.urandom(5 * MIB + 77)
            loan = lending.lend(Parts(b"head", b"", data, data[:4097]))
            source = Borrowing().open(decode_lent(loan.frame), returns=True)
            assert [bytes(source.take(number)) for number in (1, 2, 3)] == [b"", data, data[:4097]]
            source.finish()
            lending.end(loan, is_read=True)

    async def test_views_are_read_only_and_their_memory_is_not_used_again(self, lending: Lending) -> None:
        loan = lending.lend(Parts(b"head", memoryview(b"x" * MIB)))
        view = Borrowing().open(decode_lent(loan.frame), returns=False, views=True).take(1)
        lending.end(loan, is_read=True)
        assert lending.lend(b"y" * MIB).segment is not loan.segment
        assert view.readonly
        assert bytes(view) == b"x" * MIB

    async def test_what_has_to_be_writable_is_no_view(self, lending: Lending) -> None:
        loan = lending.lend(Parts(b"head", memoryview(b"x" * MIB)))
        taken = Borrowing().open(decode_lent(loan.frame), returns=False, views=True).take(1, writable=True)
        taken[:1] = b"y"
        assert bytes(loan.parts()[1]) == b"x" * MIB
        lending.end(loan, is_read=True)
        assert lending.lend(b"y" * MIB).segment is loan.segment

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_views_can_be_read_in_a_forked_process(self, lending: Lending) -> None:
        loan = lending.lend(Parts(b"head", memoryview(b"x" * MIB)))
        view = Borrowing().open(decode_lent(loan.frame), returns=False, views=True).take(1)
        child = os.fork()
        if child == 0:
            os._exit(0 if view[0] == view[-1] == ord("x") else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    async def test_a_reader_notices_that_the_memory_was_used_again(self, lending: Lending) -> None:
        loan = lending.lend(b"x" * MIB)
        found = Borrowing().open(decode_lent(loan.frame), returns=False)
        lending.end(loan, is_read=True)
        lending.lend(b"y" * MIB)
        with pytest.raises(ValueGone, match="taken back"):
            found.finish()

    async def test_more_values_than_there_are_descriptors_can_be_lent(
        self, lending: Lending, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(segments, "_MOST_FILES", 2)
        loans = [lending.lend(b"x" * MIB) for _ in range(4)]
        assert [loan.segment.is_file for loan in loans] == [True, True, False, False]
        with pytest.raises(NotReachable):
            Borrowing().open(decode_lent(loans[3].frame), returns=False)
        for loan in loans:
            lending.end(loan, is_read=True)
        assert lending.lend(b"x" * MIB).segment.is_file

    async def test_what_cannot_be_mapped_has_to_be_sent(
        self, lending: Lending, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lent = decode_lent(lending.lend(b"x" * MIB).frame)

        def no_room(*_: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        monkeypatch.setattr(mmap, "mmap", no_room)
        with pytest.raises(NotReachable):
            Borrowing().open(lent, returns=False)

    async def test_a_value_larger_than_free_memory_is_refused(
        self, lending: Lending, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(segments, "free_memory", lambda: 100 * MIB)
        with pytest.raises(PayloadTooLarge, match="only 104,857,600 bytes of memory are free"):
            lending.lend(bytes(128 * MIB))

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"cookie": b"0" * 16}, FrameRejected),
            ({"generation": 7}, ValueGone),
            ({"inode": 1}, ValueGone),
            ({"sizes": (2**40,)}, ValueGone),
            ({"host": "another"}, NotReachable),
            ({"fd": 0}, (ValueGone, FrameRejected, NotReachable)),
            ({"pid": 2**22 + 1}, ValueGone),
        ],
    )
    async def test_a_forged_reference_opens_nothing(
        self, lending: Lending, change: dict[str, Any], error: type[Exception]
    ) -> None:
        lent = decode_lent(lending.lend(b"x" * MIB).frame)
        with pytest.raises(error):
            Borrowing().open(msgspec.structs.replace(lent, **change), returns=False)

    def test_a_value_whose_owner_died_is_gone_and_its_memory_too(self) -> None:
        here = Borrowing()
        with lent_by_another_process(b"x" * 1000) as lent:
            assert here.open(lent, returns=False).head == b"x" * 1000
        here.trim()

        with pytest.raises(ValueGone, match="lost with the process"):
            here.open(lent, returns=False)
        with pytest.raises(ValueGone):
            borrowing._open(lent, 2000)


class TestTransfers:
    async def test_a_chunk_that_is_missing_cut_or_forged_is_noticed(
        self, settings: Settings, signer: Signer, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        ours = Transfers(keys.address(settings.redis_url), keys, signer)
        for name, data, complaint in (
            ("missing", None, "is missing"),
            ("cut", b"x" * 10, "is cut"),
            ("forged", bytes(37 + 100), "no accepted key signed"),
        ):
            if data is not None:
                redis_client.set(keys.transfer(name, "0"), data)
            redis_client.rpush(keys.transfer(name, "ready"), "0")
            with pytest.raises(FrameRejected, match=complaint):
                await asyncio.to_thread(ours.receive, name, [100])

    async def test_redis_holds_no_more_than_a_window(
        self, settings: Settings, signer: Signer, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        ours = Transfers(keys.address(settings.redis_url), keys, signer)
        data = os.urandom((transfers.WINDOW + 5) * CHUNK + 17)
        sending = asyncio.create_task(asyncio.to_thread(ours.send, "t", [memoryview(data)], lambda: True))
        await until(lambda: redis_client.llen(keys.transfer("t", "ready")) == transfers.WINDOW)
        assert len(redis_client.keys(keys.transfer("t", "[0-9]*"))) == transfers.WINDOW

        [found] = await asyncio.to_thread(ours.receive, "t", [len(data)])

        await sending
        assert digest(found) == digest(data)
        assert redis_client.keys(keys.transfer("t", "[0-9]*")) == []
        assert all(redis_client.pttl(key) > 0 for key in redis_client.keys(keys.transfer("t", "*")))

    async def test_what_was_taken_back_is_not_waited_for(self, settings: Settings, signer: Signer, keys: Keys) -> None:
        ours = Transfers(keys.address(settings.redis_url), keys, signer)
        await asyncio.to_thread(ours.refuse, "t")
        with pytest.raises(TransferBroken, match="taken it back"):
            await asyncio.to_thread(ours.receive, "t", [100])


async def test_another_content_of_the_same_memory_is_not_sent_for_the_one_that_was_asked_for(
    settings: Settings, signer: Signer, lending: Lending
) -> None:
    ours = Transfers(settings.keys.address(settings.redis_url), settings.keys, signer)
    lent = decode_lent((loan := lending.lend(b"x" * MIB)).frame)
    lending.end(loan, is_read=True)
    assert lending.lend(b"y" * MIB).segment is loan.segment
    lending.send("t", f"{lent.cookie.hex()}:{lent.generation}")
    with pytest.raises(TransferBroken, match="taken it back"):
        await asyncio.to_thread(ours.receive, "t", lent.sizes)


async def test_a_value_that_is_taken_back_while_it_is_sent_does_not_arrive(
    settings: Settings, signer: Signer, lending: Lending, redis_client: "redis.Redis"
) -> None:
    ours = Transfers(settings.keys.address(settings.redis_url), settings.keys, signer)
    size = (transfers.WINDOW + 5) * CHUNK
    lent = decode_lent((loan := lending.lend(b"x" * size)).frame)
    lending.send("t", f"{lent.cookie.hex()}:{lent.generation}")
    await until(lambda: redis_client.llen(settings.keys.transfer("t", "ready")) == transfers.WINDOW)
    lending.end(loan, is_read=True)
    assert lending.lend(b"y" * size).segment is loan.segment
    with pytest.raises(TransferBroken, match="taken it back"):
        await asyncio.to_thread(ours.receive, "t", lent.sizes)
