"""Schedules: durable calls that are submitted whenever they are due."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from qserve.broker.instance.state import State
from qserve.broker.instance.stored_schedules import (
    note_fired,
    pause_schedule,
    read_fired,
    read_paused_schedules,
    read_schedule,
    read_schedules,
    redis_time,
    remove_schedule,
    write_schedule,
)
from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.broker.redis_errors import CommandRefused
from qserve.durable.cron import parse_when
from qserve.errors import (
    BackPressureError,
    DeploymentNotFound,
    DeploymentUnavailable,
    FrameRejected,
    MethodNotFound,
    QServeError,
)
from qserve.user_code.method_names import problem_of
from qserve.wire.call_record import ANYONE, NEVER_MS, DurableCall, DurableOptions, Terms, durable_with_meta, id_in_shard
from qserve.wire.codec import Codec
from qserve.wire.messages import MODEL, NO_META, PYTHON, encode, encode_bare
from qserve.wire.names import is_name

logger = logging.getLogger(__name__)

_STEP_S = 60.0
"""A clock that is set back by less is waited for, so that no moment comes twice."""


class Plan(NamedTuple):
    """A schedule as users declare it, before its arguments are packed."""

    name: str
    when: str
    deployment: str
    method: str
    options: DurableOptions
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: Mapping[str, str] = NO_META


class Schedule(msgspec.Struct, frozen=True, array_like=True):
    """A schedule as it is kept, signed, in Redis.

    Attributes:
        when: See `parse_when`.
        payload: Packed (args, kwargs).
        created: Unix time in ms on the clock of Redis. Nothing is due before.
    """

    name: str
    when: str
    deployment: str
    method: str
    payload: bytes
    terms: Terms
    expires_s: float | None
    low_priority: bool
    created: int


class ScheduleWithMeta(Schedule, frozen=True, array_like=True):
    """A schedule whose calls say more than what is to be run; also what every schedule is read as."""

    meta: dict[str, str] = {}


class Fired(NamedTuple):
    """What became of the last moment at which a schedule was due.

    Attributes:
        at: Unix time in ms.
        call_id: The call that was submitted.
        error: Why no call was submitted, "" if one was.
    """

    at: int
    call_id: str
    error: str


class Schedules:
    """The schedules of an instance. Synchronous; raises redis-py's errors."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._redis: Any = state.redis
        self._keys = state.keys
        self._signer = state.signer
        self._ignored: dict[str, str] = {}

    def put_declared(self, deployments: frozenset[str], codec: Codec) -> None:
        """Put those declared schedules that call one of these deployments; each takes effect once."""
        for plan in [plan for plan in Declared.plans if plan.deployment in deployments]:
            self.put(plan, codec)
            Declared.plans.remove(plan)

    def put(self, plan: Plan, codec: Codec) -> ScheduleWithMeta:
        """Add a schedule, or replace the one of its name. An equal one is left alone, so that it misses no moment.

        Raises:
            ValueError: The name or the time is not possible.
            DeploymentNotFound, MethodNotFound: There is nothing to call.
            ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
        """
        if not is_name(plan.name):
            raise ValueError(
                f"{plan.name!r} cannot be the name of a schedule: it takes 1 to 63 of the characters A-Z a-z 0-9 _ . -"
            )
        parse_when(plan.when)
        if plan.options.delay_s or plan.options.durability:
            raise ValueError("a schedule takes neither delay nor durability: leave them out")
        deployed = self._state.get(plan.deployment)
        if deployed is None:
            raise DeploymentNotFound(
                f"The schedule {plan.name!r} calls {plan.deployment!r}, and there is no such deployment: "
                f"{', '.join(sorted(self._state.list())) or 'nothing is deployed'}. Deploy it first."
            )
        if problem := problem_of(plan.method, deployed.spec.methods):
            raise MethodNotFound(f"The schedule {plan.name!r} calls {plan.deployment!r}, but {problem}.")
        payload = codec.pack_call(plan.args, plan.kwargs, f"the call of schedule {plan.name}")
        options = plan.options
        made = ScheduleWithMeta(
            *(plan.name, plan.when, plan.deployment, plan.method, payload),
            *(options.terms, options.expires_s, options.low_priority, int(self.now() * 1000), dict(plan.meta)),
        )
        known = self.get(plan.name)
        if (
            known is not None
            and known.meta.get(MODEL) == made.meta.get(MODEL)  # the rest of it says where the schedule was put
            and msgspec.structs.replace(made, created=known.created, meta=known.meta) == known
        ):
            return known
        self.write(made)
        return made

    def write(self, schedule: ScheduleWithMeta) -> None:
        """Keep a schedule, in place of one with the same name."""
        write_schedule(self._redis, self._keys, schedule.name, self._signer.seal(encode_bare(schedule)))

    def get(self, name: str) -> ScheduleWithMeta | None:
        """The schedule of a name; None if there is none.

        Raises:
            FrameRejected: No key of ours signed it.
        """
        frame = read_schedule(self._redis, self._keys, name)
        return self._read(name, frame) if frame is not None else None

    def all(self) -> Iterator[tuple[ScheduleWithMeta, Fired | None]]:
        """All schedules, with what became of their last moments, but those that no key of the instance signed."""
        frames, fired = read_schedules(self._redis, self._keys)
        for name in sorted(frames):
            try:
                yield self._read(name.decode(), frames[name]), _fired(fired.get(name))
            except FrameRejected as exc:
                self._ignore(name.decode(), exc)

    def remove(self, name: str) -> bool:
        """Remove a schedule; returns False if there is none. Calls that it has submitted go on."""
        return remove_schedule(self._redis, self._keys, name)

    def pause(self, name: str, who: str) -> bool:
        """Let a schedule submit nothing, or go on if `who` is ""; returns False if there is none of this name.

        The moments that come meanwhile are left out, and not made up for. A schedule stays paused when it is put anew.
        """
        if read_schedule(self._redis, self._keys, name) is None:
            return False
        pause_schedule(self._redis, self._keys, name, f"{self.now():.0f} {who[:200]}" if who else "")
        return True

    def paused(self) -> dict[str, str]:
        """Since when and by whom schedules are paused, by name; see `pause_of`."""
        return read_paused_schedules(self._redis, self._keys)

    def now(self) -> float:
        """Unix time on Redis' clock, which is everybody's."""
        return redis_time(self._redis)

    def fire_due(self, payloads: Payloads) -> float:
        """Submit the calls that are due, and return in how many seconds the next ones will be.

        Any number of processes may do this: the call of a schedule's moment has the same id for all of them, and is
        submitted once. Of moments that were missed, the last one is made up for.

        Raises:
            BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked, or has not taken the call of a
                schedule; those of the others are submitted all the same.
        """
        now, pause, paused = self.now(), 3600.0, self.paused()
        failure: Exception | None = None
        for schedule, fired in self.all():
            try:
                when = parse_when(schedule.when)
            except ValueError as exc:  # a time zone that is not known here
                self._ignore(schedule.name, exc)
                continue
            moment = when.last_between(self._since(schedule, fired, now), now)
            if moment is not None and schedule.name in paused:
                left_out = Fired(round(moment * 1000), "", "left out, because the schedule is paused")
                note_fired(self._redis, self._keys, schedule.name, msgspec.msgpack.encode(left_out))
            elif moment is not None:
                try:
                    self._fire(schedule, moment, payloads)
                except (QServeError, CommandRefused) as exc:  # the server of its shard may be down, and others not
                    failure = exc
            pause = min(pause, when.next_after(now) - now)
        if failure is not None:
            raise failure
        return pause

    def _ignore(self, name: str, error: Exception) -> None:
        """Say once, and not with every look, that a schedule is not heeded."""
        if self._ignored.get(name) != str(error):
            self._ignored[name] = str(error)
            logger.error("Ignoring schedule %r: %s", name, error)

    def _since(self, schedule: ScheduleWithMeta, fired: Fired | None, now: float) -> float:
        """After which time the moments of a schedule count: those before are over."""
        created, last = schedule.created / 1000, fired.at / 1000 if fired is not None else 0.0
        if max(created, last) <= now + _STEP_S:
            return max(created, last)
        if fired is not None and last <= now + _STEP_S:
            return last
        logger.warning("Schedule %s goes on from now, because the clock of Redis was set back", schedule.name)
        begins = Fired(int(now * 1000), "", "left out, because the clock of Redis was set back")
        note_fired(self._redis, self._keys, schedule.name, msgspec.msgpack.encode(begins))
        return now

    def _fire(self, schedule: ScheduleWithMeta, moment: float, payloads: Payloads) -> None:
        at = round(moment * 1000)
        last = _fired(read_fired(self._redis, self._keys, schedule.name))
        if last is not None and last.at == at:
            return  # somebody else was first, and the record of the call may be gone already
        sealed = self._signer.seal(encode(["schedule", schedule.name, schedule.created, at]))
        digits = hashlib.sha256(sealed).hexdigest()
        call_id = id_in_shard(digits, self._keys.of(schedule.deployment).shard)
        call, options = call_of(schedule, call_id)
        error = ""
        try:
            submit_now(self._redis, self._keys, self._signer, payloads, call, options)
            logger.info("Schedule %s is due: call %s", schedule.name, call_id)
        except (DeploymentNotFound, DeploymentUnavailable, BackPressureError) as exc:
            error = str(exc)
            logger.error("Schedule %s is due, but its call is left out: %s", schedule.name, error)
        note_fired(self._redis, self._keys, schedule.name, msgspec.msgpack.encode(Fired(at, call_id, error)))

    def _read(self, name: str, frame: bytes) -> ScheduleWithMeta:
        try:
            schedule = _decode(self._signer.open(frame))
        except msgspec.DecodeError as exc:
            raise FrameRejected(f"not a schedule: {exc}") from exc
        if schedule.name != name:
            raise FrameRejected(f"schedule {schedule.name!r} under another name")
        return schedule


def call_of(schedule: ScheduleWithMeta, call_id: str) -> tuple[DurableCall, DurableOptions]:
    """The call that a schedule submits, under an id, and how."""
    head = (call_id, schedule.deployment, ANYONE, NEVER_MS, PYTHON, schedule.method, True, schedule.payload)
    call = DurableCall(*head, terms=schedule.terms)
    if schedule.meta:
        call = durable_with_meta(call, schedule.meta)
    return call, DurableOptions(0.0, schedule.expires_s, schedule.low_priority, schedule.terms)


def next_moment(schedule: Schedule, now: float) -> float | None:
    """When a schedule is due next; None where its time zone is not known here."""
    try:
        return parse_when(schedule.when).next_after(now)
    except ValueError:
        return None


class Declared:
    """Schedules that applications declare while they are imported. They take effect when these are deployed."""

    plans: list[Plan] = []  # noqa: RUF012 one for the process, like what it imports


def _fired(packed: bytes | None) -> Fired | None:
    if packed is None:
        return None
    try:
        return msgspec.msgpack.decode(packed, type=Fired)
    except msgspec.DecodeError:  # not ours; the call of a moment has its id all the same
        return None


_decode = msgspec.msgpack.Decoder(ScheduleWithMeta).decode
