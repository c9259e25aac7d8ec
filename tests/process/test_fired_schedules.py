"""The calls of schedules in Redis: one for each moment, whoever submits it."""

import logging
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.payloads import Payloads
from qserve.broker.redis_errors import CommandRefused
from qserve.durable.schedules import Fired, Plan, Schedules, ScheduleWithMeta
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions
from qserve.wire.codec import Codec
from qserve.wire.messages import Signer
from tests.support.calling import deploy


def test_two_schedulers_that_see_the_same_moment_submit_one_call(
    settings: Settings, keys: Keys, signer: Signer, state: State
) -> None:
    deploy(settings)
    one, two = Schedules(state), Schedules(State(settings.redis_url, keys, signer))
    made = one.put(
        Plan("s", "every 1h", "Echo", "", DurableOptions(), (), {}), Codec(allow_pickle=False, max_bytes=1000)
    )
    one.write(msgspec.structs.replace(made, created=made.created - 7_200_000))
    payloads = Payloads(keys, signer, 1000)
    for each in (one, two):
        each.fire_due(payloads)
        state.redis.hdel(keys.fired, "s")  # not noted yet
    assert state.redis.xlen(keys.calls("Echo")) == 1
    two._redis.close()


CODEC = Codec(allow_pickle=False, max_bytes=1000)


def overdue(schedules: Schedules, name: str, deployment: str = "Echo") -> ScheduleWithMeta:
    """A schedule whose hour has come."""
    made = schedules.put(Plan(name, "every 1h", deployment, "", DurableOptions(), (), {}), CODEC)
    made = msgspec.structs.replace(made, created=made.created - 7_200_000)
    schedules.write(made)
    return made


def test_a_schedule_whose_call_redis_refuses_keeps_no_other_from_being_submitted(
    settings: Settings, keys: Keys, signer: Signer, state: State
) -> None:
    for name in ("Broken", "Echo"):
        deploy(settings, name=name)
    schedules, payloads = Schedules(state), Payloads(keys, signer, 1000)
    overdue(schedules, "a", "Broken")
    overdue(schedules, "b")
    state.redis.delete(keys.of("Broken").due("Broken"))
    state.redis.set(keys.of("Broken").due("Broken"), "not what it should be")

    with pytest.raises(CommandRefused, match="WRONGTYPE"):
        schedules.fire_due(payloads)

    assert state.redis.xlen(keys.of("Echo").calls("Echo")) == 1
    assert {each.name: fired is not None for each, fired in schedules.all()} == {"a": False, "b": True}


@pytest.mark.parametrize("known", ["its last call", "that it was put"])
def test_a_clock_that_was_set_back_silences_no_schedule(
    settings: Settings,
    keys: Keys,
    signer: Signer,
    state: State,
    known: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of the time in which the clock was ahead there is only what was noted then."""
    deploy(settings)
    schedules, payloads = Schedules(state), Payloads(keys, signer, 1000)
    made, now = overdue(schedules, "s"), schedules.now()
    ahead = int(now * 1000) + 86_400_000
    if known == "its last call":
        fired: Any = msgspec.msgpack.encode(Fired(ahead, "d1", ""))
        state.redis.hset(keys.fired, "s", fired)
    else:
        schedules.write(msgspec.structs.replace(made, created=ahead))

    schedules.fire_due(payloads)
    assert state.redis.xlen(keys.calls("Echo")) == 0  # whether that moment is over is not known
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [
        "Schedule s goes on from now, because the clock of Redis was set back"
    ]
    for hours in (1, 1, 2):
        monkeypatch.setattr(schedules, "now", lambda hours=hours: now + 3600 * hours)
        schedules.fire_due(payloads)

    assert state.redis.xlen(keys.calls("Echo")) == 2


def test_what_makes_a_schedule_impossible_is_said_once_and_not_every_second(
    settings: Settings, keys: Keys, signer: Signer, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    deploy(settings)
    schedules, payloads = Schedules(state), Payloads(keys, signer, 1000)
    made = overdue(schedules, "far")
    schedules.write(msgspec.structs.replace(made, when="0 3 * * * Nowhere/Land"))
    state.redis.hset(keys.schedules, "forged", "no key of ours signed this")
    for _ in range(3):
        schedules.fire_due(payloads)
    said = sorted(each.getMessage() for each in caplog.records if each.levelno == logging.ERROR)
    assert [text.partition(": ")[0] for text in said] == ["Ignoring schedule 'far'", "Ignoring schedule 'forged'"]


class Interrupted:
    """A client of Redis; after one of its commands that change or read schedules, something else happens."""

    def __init__(self, client: Any, step: int, then: Callable[[], object]) -> None:
        self._client = client
        self._steps = step
        self._then = then

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name not in ("hset", "hdel", "hgetall"):
            return found

        def run(*given: Any, **more: Any) -> Any:
            answer = found(*given, **more)
            self._steps -= 1
            if self._steps == 0:
                self._then()
            return answer

        return run


def forget_calls(state: State, keys: Keys) -> None:
    """Let the records of all calls expire."""
    for call_id in cast("list[bytes]", state.redis.zrange(keys.index("Echo", "queued"), 0, -1)):
        state.redis.delete(keys.call(call_id.decode()))


@pytest.mark.parametrize("change", ["remove", "remove a paused one", "replace"])
@pytest.mark.parametrize("interrupted", ["who changes it", "who submits its calls"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_schedule_that_is_changed_repeats_no_moment(
    settings: Settings, keys: Keys, signer: Signer, state: State, change: str, interrupted: str, step: int
) -> None:
    """The calls of moments that are long over have no record any more by which they would be known."""
    deploy(settings)
    schedules, payloads = Schedules(state), Payloads(keys, signer, 1000)
    made = overdue(schedules, "s")
    if change == "remove a paused one":
        schedules.pause("s", "Ada")
    schedules.fire_due(payloads)
    submitted = state.redis.xlen(keys.calls("Echo"))
    assert submitted == (0 if change == "remove a paused one" else 1)
    forget_calls(state, keys)
    other = State(settings.redis_url, keys, signer)
    others = Schedules(other)

    def change_it() -> None:
        if change == "replace":
            schedules.write(msgspec.structs.replace(made, payload=b"other", created=int(schedules.now() * 1000)))
        else:
            schedules.remove("s")

    if interrupted == "who changes it":
        schedules._redis = Interrupted(state.redis, step, lambda: others.fire_due(payloads))
        change_it()
    else:
        others._redis = Interrupted(other.redis, step, change_it)
    others.fire_due(payloads)
    assert state.redis.xlen(keys.calls("Echo")) == submitted
    if change != "replace":
        assert not state.redis.exists(keys.schedules, keys.fired, keys.paused_schedules)
    other.close()


def test_a_scheduler_that_was_held_up_does_not_submit_what_another_has_submitted_long_ago(
    settings: Settings, keys: Keys, signer: Signer, state: State
) -> None:
    deploy(settings)
    schedules, payloads = Schedules(state), Payloads(keys, signer, 1000)
    overdue(schedules, "s")
    slow = State(settings.redis_url, keys, signer)
    late = Schedules(slow)

    def submit_and_forget() -> None:
        schedules.fire_due(payloads)
        forget_calls(state, keys)

    late._redis = Interrupted(slow.redis, 3, submit_and_forget)  # it has read everything
    late.fire_due(payloads)
    assert state.redis.xlen(keys.calls("Echo")) == 1
    slow.close()
