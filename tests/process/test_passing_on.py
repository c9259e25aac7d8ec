"""Large results that are arguments of other calls: handed on by whoever calls, and not looked at there."""

import gc
import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import numpy
import pytest

from qserve.broker.large.lending import Lending
from qserve.calls.handle import get_handle
from qserve.calls.process_client import set_current_client
from qserve.calls.ref import Ref
from qserve.settings import Settings
from qserve.values.borrowing import Borrowed, Borrowing, NotReachable, ValueGone
from qserve.values.segments import COPIED
from qserve.wire.codec import Codec
from qserve.wire.messages import Lent, Signer, decode_lent
from qserve.wire.parts import Passed
from tests.support.calling import Caller, Code, calling, deploy, serving
from tests.support.lender import lent_by_another_process
from tests.support.waiting import until

MIB = 2**20


class Parties:
    """A caller, and the replicas of two deployments."""

    def __init__(self, caller: Caller, last: Code, lent_by_first: dict[bytes, Any]) -> None:
        self.caller = caller
        self.last = last
        self.lent_by_first = lent_by_first
        self.first: Any = get_handle("First")
        self.second: Any = get_handle("Last")


@pytest.fixture
async def parties(settings: Settings) -> AsyncIterator[Parties]:
    first, last = deploy(settings, "First"), deploy(settings, "Last", idempotent=True)
    async with (
        calling(settings) as caller,
        serving(settings, first) as (lender, _),
        serving(settings, last) as (_, code),
    ):
        set_current_client(caller.client)
        yield Parties(caller, code, lender._answers.lending._lent)
        set_current_client(None)


def data(size: int = MIB) -> "numpy.ndarray[Any, Any]":
    return numpy.frombuffer(os.urandom(size), numpy.uint8)


def digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest()


@pytest.mark.parametrize("size", [300_000, 9 * MIB])
async def test_a_large_result_goes_on_without_being_unpacked_by_the_caller(parties: Parties, size: int) -> None:
    given = data(size)
    ref: Ref[Any] = parties.first.remote(given)
    found = await parties.second.remote({"a": [ref, 7], "b": ref})
    assert digest(found["a"][0]) == digest(given) == digest(found["b"])
    assert found["a"][1] == 7
    assert isinstance(ref.raw_result, Borrowed)
    assert ref.exception() is None


async def test_a_result_that_is_handed_on_is_there_for_the_caller_too(parties: Parties) -> None:
    given = data()
    ref: Ref[Any] = parties.first.remote(given)
    on = parties.second.remote(ref)
    assert digest(await ref) == digest(given)
    assert digest(ref.result()) == digest(given)
    assert digest(await on) == digest(given)


async def test_its_memory_is_used_again_once_nobody_needs_it(parties: Parties) -> None:
    gc.disable()  # nothing of this waits for the collector
    try:
        await parties.second.remote(parties.first.remote(data()))
        [loan] = parties.lent_by_first.values()
        await until(lambda: loan.segment.state == COPIED)
        await parties.first.remote(7)  # until here the result may be a local variable of a frame that has not ended
        await parties.second.remote(value=parties.first.remote(data()))
        assert loan.segment.generation == 2
    finally:
        gc.enable()


async def test_the_result_is_asked_for_before_the_other_call_reads_it(parties: Parties) -> None:
    given = data()
    ref: Ref[Any] = parties.first.remote(given)
    waiting = parties.second.wait.remote(ref)
    await ref
    await parties.first.remote(data())  # would use the memory again, had it been given back
    parties.last.gate.set()
    assert digest(await waiting) == digest(given)


async def test_who_cannot_open_it_is_sent_it_by_the_caller(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Borrowing.open

    def open_results(self: Borrowing, lent: Lent, *, returns: bool, views: bool = False) -> Any:
        if lent.owner == parties.caller.client.id:
            raise NotReachable
        return real(self, lent, returns=returns, views=views)

    given = data(3 * MIB)
    ref: Ref[Any] = parties.first.remote(given)
    waiting = parties.second.wait.remote(ref)
    await until(ref.done)
    monkeypatch.setattr(Borrowing, "open", open_results)
    parties.last.gate.set()
    assert digest(await waiting) == digest(given)
    assert isinstance(ref.raw_result, Borrowed)


async def test_an_error_of_the_first_call_is_that_of_the_second(parties: Parties) -> None:
    with pytest.raises(ValueError, match="no"):
        await parties.second.remote(parties.first.fail.remote("no"))
    assert parties.last.started == []


async def test_a_call_that_is_cancelled_leaves_the_memory_to_whoever_reads_it(parties: Parties) -> None:
    ref: Ref[Any] = parties.first.remote(data())
    on = parties.second.wait.remote(ref)
    await until(lambda: parties.last.started)
    [loan] = parties.lent_by_first.values()
    on.cancel()
    del ref, on
    await parties.first.remote(data())
    assert loan.segment.cookie not in parties.lent_by_first
    assert loan.segment.generation == 1


def test_a_value_outlives_the_process_that_made_it(settings: Settings, signer: Signer) -> None:
    codec = Codec(allow_pickle=False, max_bytes=MIB)
    here, there = Lending("here", settings.redis_url, settings.keys, signer), Borrowing()
    with lent_by_another_process(b"\xc4\x03abc") as lent:
        value = Borrowing().open(lent, returns=True)
        value.hold()
        loan = here.lend(packed := codec.pack_arguments((Passed(value),), {}))

    frame = decode_lent(loan.frame)
    arguments = there.open(frame, returns=False)
    arguments.refer_to([there.open(each, returns=False) for each in frame.passed])

    assert codec.unpack_call(arguments) == ((b"abc",), {})
    here.stop()
    del packed, value, loan
    gc.collect()
    with pytest.raises((ValueGone, NotReachable)):
        Borrowing().open(frame.passed[0], returns=False)
