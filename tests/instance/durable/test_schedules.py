"""Schedules: durable calls that Celery's beat submits when they are due, each once, whatever runs twice or dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import psutil
import pytest
from click.testing import CliRunner

from qserve import serve
from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads
from qserve.cli.command_line import main
from qserve.durable.cron import parse_when
from qserve.durable.schedules import Schedules
from qserve.errors import MethodNotFound
from qserve.testing import TestInstance
from qserve.wire.messages import Signer, encode
from tests.support.gates import Notes
from tests.support.waiting import wait_until


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("when", "after", "due"),
    [
        ("0 3 * * *", "2026-01-31 03:00", "2026-02-01 03:00"),
        ("*/15 9-17 * * mon-fri", "2026-11-20 17:45", "2026-11-23 09:00"),
        ("30 6 1,15 * *", "2026-11-01 06:30", "2026-11-15 06:30"),
        ("0 0 13 * 5", "2026-11-01 00:00", "2026-11-06 00:00"),
        ("0 12 29 2 *", "2026-01-01 00:00", "2028-02-29 12:00"),
        ("0 0 * jan 7", "2026-01-04 00:00", "2026-01-11 00:00"),
        ("every 30s", "2026-01-01 00:00:29.9", "2026-01-01 00:00:30"),
        ("every 6h", "2026-01-01 06:00", "2026-01-01 12:00"),
    ],
)
def test_what_is_due_next(when: str, after: str, due: str) -> None:
    assert datetime.fromtimestamp(parse_when(when).next_after(at(after)), UTC) == datetime.fromtimestamp(at(due), UTC)


def test_clocks_that_are_changed_neither_skip_nor_repeat() -> None:
    when = parse_when("30 2 * * * Europe/Berlin")
    spring, autumn = at("2026-03-29 00:00", "Europe/Berlin"), at("2026-10-25 00:00", "Europe/Berlin")
    assert when.next_after(spring) == at("2026-03-29 01:30")
    first = when.next_after(autumn)
    assert datetime.fromtimestamp(when.next_after(first), UTC) == datetime.fromtimestamp(at("2026-10-26 01:30"), UTC)


@pytest.mark.parametrize(
    ("when", "after", "due"),
    [
        ("15,30 2 * * * Australia/Lord_Howe", "2026-10-04 00:00", ["02:30", "02:45"]),  # by half an hour, at 02:00
        ("0 2,3 * * * Antarctica/Troll", "2026-03-29 00:00", ["03:00", "04:00"]),  # by two hours, at 01:00
        ("10,40 23 * * * America/Nuuk", "2025-03-29 12:00", ["00:10", "00:40"]),  # by an hour, at 23:00
    ],
)
def test_each_time_that_clocks_skip_comes_as_much_later_as_they_go_forward(
    when: str, after: str, due: list[str]
) -> None:
    parsed = parse_when(when)
    moment, found = at(after, when.rsplit(maxsplit=1)[-1]), []
    for _ in due:
        moment = parsed.next_after(moment)
        found.append(datetime.fromtimestamp(moment, parsed.zone).strftime("%H:%M"))
    assert found == due


@pytest.mark.parametrize("when", ["every 1.1s", "every 2.7s", "every 1.0005s", "every 30s"])
def test_a_moment_of_which_is_known_that_it_came_does_not_come_again(when: str) -> None:
    """What is kept of it is in whole milliseconds."""
    parsed = parse_when(when)
    for number in range(1000):
        now = 1_790_000_000 + number * 13.37
        last = parsed.last_between(0.0, now)
        assert last is not None
        assert parsed.last_between(round(last * 1000) / 1000, now) is None
        assert parsed.next_after(last) > now


def test_the_last_of_missed_moments() -> None:
    when = parse_when("0 3 * * *")
    assert when.last_between(at("2026-01-01 12:00"), at("2026-06-01 02:00")) == at("2026-05-31 03:00")
    assert when.last_between(at("2026-06-01 03:00"), at("2026-06-02 02:59")) is None
    assert parse_when("every 5s").last_between(100.0, 123.0) == 120.0


@pytest.mark.parametrize(
    "when", ["", "0 3 * *", "60 * * * *", "x * * * *", "*/0 * * * *", "0 0 31 2 *", "every 0s", "every 99999999999h"]
)
def test_what_cannot_be_is_told(when: str) -> None:
    with pytest.raises(ValueError, match=r"schedule|minute|never|second|longest"):
        parse_when(when)
    with pytest.raises(ValueError, match="time zone"):
        parse_when("0 3 * * * Nowhere/Land")


@pytest.fixture
def told(qserve_instance: TestInstance, notes: Notes) -> Iterator[serve.Deployment[Any]]:
    """Notes the id of each of its calls."""

    @serve.deployment
    def told(word: str = "") -> None:
        notes.add(f"{serve.get_replica_context().request_id} {word}".strip())

    told.deploy()
    yield told
    with closing(state_of(qserve_instance)) as state:
        for each, _ in Schedules(state).all():
            Schedules(state).remove(each.name)


def state_of(instance: TestInstance) -> State:
    return State(instance.settings.redis_url, instance.settings.keys, Signer(instance.settings.secrets))


def schedule(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["schedule", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@contextmanager
def another_beat(instance: TestInstance) -> Iterator["subprocess.Popen[bytes]"]:
    settings = instance.settings
    environment = os.environ | {"QSERVE_REDIS_URL": settings.redis_url, "QSERVE_SECRET": settings.secret}
    command = ["-m", "celery", "-A", "qserve_workers", "beat", "-S", "qserve_workers.beat:Scheduler"]
    process = subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_beats_submit_each_call_once(told: Any, qserve_instance: TestInstance, notes: Notes) -> None:
    with another_beat(qserve_instance):
        serve.schedule("often", "every 1s", told, "hello")
        begun = time.monotonic()
        lines = notes.wait_for(4)
    serve.unschedule("often")

    assert time.monotonic() - begun > 2
    ids = [line.split()[0] for line in notes.read()]
    assert len(set(ids)) == len(ids)
    assert all(line.endswith("hello") for line in lines)
    wait_until(lambda: serve.get_ref(lines[0].split()[0]).status().state == "done")
    with pytest.raises(KeyError):
        serve.unschedule("often")


def test_a_beat_that_is_killed_starts_again_and_repeats_nothing(
    told: Any, qserve_instance: TestInstance, notes: Notes
) -> None:
    serve.schedule("often", "every 1s", told.get_handle().options(durable=True, retries=1))
    notes.wait_for(2)
    beats = [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [""])[0] == "qserve: beat"]
    ours = [each for each in beats if each.environ().get("QSERVE_REDIS_URL") == qserve_instance.settings.redis_url]
    for each in ours:
        each.send_signal(signal.SIGKILL)
    count = len(notes.read())

    notes.wait_for(count + 2)
    serve.schedule("often", "every 1s", told.get_handle().options(durable=True, retries=1))  # nothing changes
    notes.wait_for(count + 3)

    assert ours
    lines = notes.read()
    assert len(set(lines)) == len(lines)


def test_schedules_are_managed_on_the_command_line(told: Any, qserve_instance: TestInstance, notes: Notes) -> None:
    schedule("put", "nightly", "0 3 * * * Europe/Berlin", "told", '"word"', "--retries", "2")
    gone = told.options(name="nobody", route_prefix="/nobody")
    gone.deploy(*told.init_args)
    schedule("put", "often", "every 1s", "nobody")
    gone.delete()

    shown = json.loads(schedule("show", "nightly"))
    assert (shown["deployment"], shown["args"], shown["retries"], shown["last"]) == ("told", ["'word'"], 2, None)
    wait_until(lambda: "no deployment 'nobody'" in schedule("ls"))
    assert "no deployment 'nobody'" in json.loads(schedule("show", "often"))["error"]
    schedule("rm", "often")
    assert "often" not in schedule("ls")
    wrong = CliRunner().invoke(main, ["schedule", "put", "x", "0 3 * *", "told"])
    assert (wrong.exit_code, "is not a schedule" in wrong.output) == (1, True)
    wrong = CliRunner().invoke(main, ["schedule", "put", "x", "0 3 * * *", "told", "it's"])
    assert (wrong.exit_code, '"it\'s" is no JSON' in wrong.output) == (2, True)
    assert CliRunner().invoke(main, ["schedule", "rm", "often"]).exit_code == 1


def test_a_schedule_whose_calls_fail_says_so(told: Any, qserve_instance: TestInstance) -> None:
    @serve.deployment
    class Clerk:
        def file(self) -> None:
            raise ValueError("the drawer is locked")

    Clerk.deploy()
    schedule("put", "filing", "every 1s", "Clerk", "--method", "file")
    wait_until(lambda: "failed: ValueError: the drawer is locked" in schedule("ls"))
    shown: dict[str, Any] = {}
    wait_until(lambda: shown.update(json.loads(schedule("show", "filing"))) or shown["state"] == "failed")
    assert "the drawer is locked" in shown["error"]
    handle: Any = Clerk.get_handle()
    with pytest.raises(MethodNotFound, match="'other' calls 'Clerk', but it has no method 'fill': there are file"):
        serve.schedule("other", "every 1h", handle.fill)
    said = CliRunner().invoke(main, ["schedule", "put", "other", "every 1h", "Clerk"])
    assert (said.exit_code, "it has no method '__call__'" in said.output) == (1, True)
    assert "other" not in schedule("ls")


@pytest.mark.parametrize("when", ["0 3 * * * Nowhere/Land", "every 99999999999999999h"])
def test_what_is_due_at_times_that_are_not_understood_here_is_shown(
    when: str, told: Any, qserve_instance: TestInstance
) -> None:
    with closing(state_of(qserve_instance)) as state:
        schedules = Schedules(state)
        serve.schedule("odd", "every 1h", told)
        made = schedules.get("odd")
        assert made is not None
        schedules.write(msgspec.structs.replace(made, when=when))
        assert f"odd  {when}  told  next unknown ('{when}': " in schedule("ls")
        assert json.loads(schedule("show", "odd"))["next"] is None


def test_seconds_that_no_clock_counts_are_refused(told: Any) -> None:
    for words in (
        ["schedule", "put", "x", "every 1h", "told", "--expires", "inf"],
        *(["call", "told", "--timeout", value] for value in ("inf", "nan", "1e300")),
        ["scale", "told", "1", "--timeout", "inf"],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2, done.output
        assert words[-1].replace("1e300", "1e+300") in done.output


def test_a_moment_that_was_missed_is_made_up_for_once(told: Any, qserve_instance: TestInstance, notes: Notes) -> None:
    settings = qserve_instance.settings
    serve.schedule("hourly", "every 1h", told)
    state = state_of(qserve_instance)
    schedules = Schedules(state)
    payloads = Payloads(settings.keys, state.signer, settings.out_of_line_bytes)
    made = schedules.get("hourly")
    assert made is not None
    earlier = msgspec.structs.replace(made, created=made.created - 36_000_000)
    frame = state.signer.seal(encode(earlier))

    state.redis.hset(settings.keys.schedules, "hourly", frame)

    notes.wait_for(1)
    for _ in range(3):
        schedules.fire_due(payloads)
    state.close()
    assert len(notes.read()) == 1
