"""Submitting durable calls: those of a tick leave together, and are submitted again until Redis has answered."""

import asyncio
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import get_args

from qserve.background import spawn
from qserve.broker.call_queue import CALLS_PER_ADMIT
from qserve.broker.confirming import Confirmed
from qserve.broker.connection import Answer
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.records import NO_STATE, Records, submit_arguments
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.refusals import NO_PAYLOAD, FullQueues, payload_refused, refusal_of_all
from qserve.context import CallInfo, current_call
from qserve.durable.watching import Watchers
from qserve.errors import BrokerUnavailable, IdempotencyConflict, QServeError
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.call_record import (
    ANYONE,
    NEVER_MS,
    Durability,
    DurableCall,
    DurableOptions,
    durable_with_meta,
    is_call_id,
    new_call_id,
)
from qserve.wire.messages import NO_META, Signer, encode

OnAdmitted = Callable[[str | QServeError], None]


class Submission:
    """A durable call that is ready to be submitted.

    Attributes:
        is_in_doubt: It was refused because Redis has not confirmed it: it may have been taken, and run, all the same.
    """

    __slots__ = ("call", "frame", "is_in_doubt", "on_admitted", "options", "payload")

    def __init__(
        self, call: DurableCall, frame: bytes, payload: bytes | None, options: DurableOptions, on_admitted: OnAdmitted
    ) -> None:
        self.call = call
        self.frame = frame
        self.payload = payload  # travels out of line, or None
        self.options = options
        self.on_admitted = on_admitted
        self.is_in_doubt = False


class Submissions:
    """Submits durable calls. Belongs to the event loop of its client.

    Guarantees: a submission that was confirmed survives every process but Redis. Submitting is repeated after a lost
    connection, because a call that is there already is not put again.

    Args:
        process: Id of the inbox that gets the outcomes.
        link: The connection for commands.
        full_queues: The errors for calls that found a full queue.
        watchers: Those who wait for the ends of calls: of one that expires they are not told by a replica.
        of_call: Finds those of this process to the shard in which a call lies.

    Attributes:
        accepted: How many new calls Redis has taken.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        records: Records,
        payloads: Payloads,
        process: str,
        link: Link,
        *,
        full_queues: FullQueues,
        watchers: Watchers,
        of_call: Callable[[str], "Submissions"],
    ) -> None:
        self._settings = settings
        self.accepted = 0
        self._keys = settings.keys
        self._signer = signer
        self._records = records
        self._payloads = payloads
        self._process = process
        self._link = link
        self._full_queues = full_queues
        self._watchers = watchers
        self._of_call = of_call
        self._collected: dict[str, list[Submission]] = {}
        self._unconfirmed: dict[str, Submission] = {}
        address = settings.keys.address(settings.redis_url)
        self._confirmed = {each: Confirmed(address, each) for each in get_args(Durability)}
        self._stopped = False

    def prepare(
        self,
        deployment: str,
        *,
        kind: int,
        method: str,
        payload: bytes,
        options: DurableOptions,
        on_admitted: OnAdmitted,
        meta: Mapping[str, str] = NO_META,
    ) -> Submission:
        """Make a call ready to be submitted. From any thread.

        Args:
            on_admitted: Called exactly once, on the loop: with the call's id, which is an earlier call's where that
                has the same idempotency key, or with the reason why it was refused.
            meta: What the hooks of this process tell the hooks of the replica.
        """
        call_id = new_call_id(self._keys.shard)
        sealed = self._payloads.seal(call_id, payload)
        if sealed is not None:
            payload = b""
        head = (call_id, deployment, ANYONE, NEVER_MS, kind, method, True, payload, sealed is not None)
        call = DurableCall(*head, terms=options.terms)
        if meta:
            call = durable_with_meta(call, meta)
        if (caller := current_call.get()) is not None:
            options = options._replace(parent=_nearest(caller))
        return Submission(call, self._signer.seal(encode(call)), sealed, options, on_admitted)

    def submit(self, submission: Submission) -> None:
        """Submit a prepared call, together with the others of this tick."""
        if self._stopped:
            submission.on_admitted(
                BrokerUnavailable("the call was not submitted, because the client of this process is stopped")
            )
            return
        durability = submission.options.durability or self._settings.durability
        if durability != "memory":
            spawn(self._submit_confirmed(submission, durability))
            return
        self._unconfirmed[submission.call.id] = submission
        if not self._collected:
            asyncio.get_running_loop().call_soon(self._flush)
        self._collected.setdefault(submission.call.deployment, []).append(submission)

    async def _submit_confirmed(self, each: Submission, durability: Durability) -> None:
        call = each.call
        try:
            if not (sender := await self._link.first_sender()).is_open:
                raise BrokerUnavailable("Redis cannot be reached")
            if each.payload is not None:
                await self._payloads.store_unconfirmed(sender, call.id, each.payload)
            arguments = submit_arguments(self._keys, call.deployment, [(call, each.frame, each.options)], self._process)
            answer = await self._confirmed[durability].submit(arguments)
        except (BrokerUnavailable, CommandRefused) as exc:
            each.is_in_doubt = True
            text = f"call {call.id} was not confirmed with durability={durability!r}: {exc}. It may be stored and run, "
            each.on_admitted(BrokerUnavailable(f"{text}or be lost: `serve.get_ref({call.id!r})` tells"))
            return
        self._admitted(each, answer, 0)

    def _flush(self) -> None:
        sender = self._link.sender
        if not sender.is_open or not self._collected:
            return  # `link_up` or `link_down` goes on
        reach("submit")
        collected, self._collected = self._collected, {}
        for deployment, submissions in collected.items():
            for start in range(0, len(submissions), CALLS_PER_ADMIT):
                batch = submissions[start : start + CALLS_PER_ADMIT]
                for each in batch:
                    if each.payload is not None:
                        self._payloads.put_unconfirmed(sender, each.call.id, each.payload)
                calls = [(each.call, each.frame, each.options) for each in batch]
                self._records.submit(sender, deployment, calls, self._process, partial(self._answered, batch))
        sender.flush()
        reach("submit-sent")

    def _answered(self, batch: list[Submission], answer: Answer) -> None:
        if isinstance(answer, BrokerUnavailable):
            return  # the connection is lost: `link_up` asks again
        reach("submitted")
        for place, each in enumerate(batch):
            if self._unconfirmed.pop(each.call.id, None) is not None:
                self._admitted(each, answer, place)

    def _admitted(self, each: Submission, answer: Answer, place: int) -> None:
        if each.options.expires_s is not None:  # nobody tells of a call that no replica looks at
            self._watchers.look_when_expired(each.call.id, each.options.expires_s)
        if self._keys.shards == 1 and not isinstance(answer, Exception) and answer[0] == NO_STATE:
            verdict: str | QServeError = _lost(each.call.deployment)
        else:  # a shard of a cluster knows its own deployments only
            verdict = _verdict(each.call, answer, place, self._full_queues)
        if verdict == each.call.id:
            self.accepted += 1
            parent = each.options.parent
            if parent and (its := self._of_call(parent)) is not self:
                spawn(its.note_child(parent, each.call.id))
        each.on_admitted(verdict)

    async def note_child(self, parent: str, call_id: str) -> None:
        """Note that a call of this shard has made one of another shard, unless Redis cannot be reached now."""
        sender = await self._link.first_sender()
        if sender.is_open:
            self._records.note_child(sender, parent, call_id)

    @property
    def unconfirmed(self) -> Container[str]:
        """Ids of submitted calls that Redis has not confirmed yet."""
        return self._unconfirmed

    def link_up(self) -> None:
        """Submit again what is not confirmed, because there is a new connection."""
        self._records.open(self._link.sender)
        self._collected = {}
        for submission in self._unconfirmed.values():
            self._collected.setdefault(submission.call.deployment, []).append(submission)
        self._flush()

    def link_down(self) -> None:
        """Tell those who submit that Redis has been away for too long."""
        self._collected = {}
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for each in unconfirmed.values():
            each.is_in_doubt = True
            text = f"Redis cannot be reached; whether it has taken call {each.call.id} is not known"
            each.on_admitted(BrokerUnavailable(text))

    def stop(self) -> None:
        """Submit nothing from now on, and tell those who wait for a confirmation."""
        self._stopped = True
        for confirmed in self._confirmed.values():
            confirmed.close()
        self.link_down()


def _nearest(caller: CallInfo) -> str:
    """The nearest durable call that a call is a part of, which has a record; without one, the call itself."""
    lineage = caller.lineage.split() or [caller.request_id]
    return next((each for each in reversed(lineage) if is_call_id(each)), lineage[-1])


def _lost(name: str) -> QServeError:
    return BrokerUnavailable(
        f"Redis has lost what was deployed, or nothing was ever deployed, so the call to {name!r} was not taken. A "
        "node that runs puts the deployments back within seconds: try again then"
    )


def _verdict(call: DurableCall, answer: Answer, place: int, full_queues: FullQueues) -> str | QServeError:
    name = call.deployment
    if (error := refusal_of_all(name, answer)) is not None:
        return error
    found = answer[1 + place]
    if found is None:
        return full_queues.refusal(name, answer[0])
    if found == NO_PAYLOAD:
        return payload_refused()
    said, _, other = bytes(found).decode().partition(":")
    if said == "other":
        return IdempotencyConflict("this idempotency key was used for another request: use a new key for a new request")
    return other or call.id
