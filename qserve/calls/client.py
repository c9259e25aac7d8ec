"""One sender and one inbox per process: puts calls on queues and hands each reply to whoever waits for it.

A call goes down through `admission` onto its queue; its reply comes up through `receiver` and is settled in `pending`.
"""

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from qserve.background import end, spawn
from qserve.broker.connection import Connection
from qserve.broker.counters import ShareOfCounter
from qserve.broker.lanes.lines import Lines
from qserve.broker.large.lending import Lending, Loan
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.refusals import FullQueues
from qserve.broker.server.clock import SAMPLE_EVERY_S, RedisClock
from qserve.calls.admission import Admission
from qserve.calls.call_channels import CallChannels
from qserve.calls.deadlines import Deadlines
from qserve.calls.handoff import Handoff
from qserve.calls.pending import PendingCall, PendingCalls
from qserve.calls.receiver import Receiver
from qserve.calls.reconcile import Reconciler
from qserve.calls.shards.shard_clients import ShardClients
from qserve.calls.withdrawing import Withdrawals
from qserve.durable.durable_client import DurableCalls
from qserve.errors import BrokerUnavailable, CallCancelled, FrameRejected, Indeterminate
from qserve.failpoints import reach
from qserve.hooks import ClientHook, HookChain, load_hooks
from qserve.settings import Settings
from qserve.telemetry.log_records import this_process
from qserve.values.borrowing import ValueGone
from qserve.wire.call_record import ANYONE
from qserve.wire.channel import Channel, Chunk, decode_chunk
from qserve.wire.messages import (
    CHUNK,
    CONTROL,
    NO_META,
    Call,
    Control,
    LargeReply,
    Outcome,
    Reply,
    Signer,
    decode_control,
    encode,
    with_meta,
)
from qserve.wire.parts import Payload

STOPPED = "the client was stopped before the call ended"
"""How calls end that are pending when their client stops."""

_COUNTED_AS = {"gateway": "", "replica": "calls_of_replicas", "worker": "calls_of_replicas"}
"""Under which counter calls are counted; what gateways count, they show by themselves."""


class Client:
    """Puts calls and receives their outcomes. Everything but `submit` and `withdraw` belongs to its loop's thread.

    Guarantees: each call gets exactly one outcome, at most once, no later than its deadline (plus a moment to ask why);
    a reply reaches only the call it was computed for, because inbox name and call ids are random per process.
    No write is ever repeated blindly.

    Args:
        handoff, lines: Of another client of this process: its event loop, and the connections that it shares.

    Attributes:
        of, of_call: The client of this process for a deployment, or for a durable call: on a cluster each shard has
            another one, made when it is first needed. From any thread.
        all: All of them, each with its connections, the `link`, and the `redis_clock`.
    """

    def __init__(self, settings: Settings, handoff: Handoff | None = None, lines: Lines | None = None) -> None:
        keys = settings.keys
        self.settings = settings
        self.signer = signer = Signer(settings.secrets)
        self.id = secrets.token_hex(16)
        self.hooks: HookChain[ClientHook] | None = None
        """The hooks around calls through handles, where there are any."""
        self.on_control: Callable[[str, Control], None] | None = None
        self._new_id: Callable[[], str] = map(f"{self.id}%x".__mod__, itertools.count()).__next__  # a frame less
        self._stopped = False
        self._keeper: asyncio.Task[None] | None = None
        self._handoff = handoff = handoff or Handoff()
        self.is_own_thread: Callable[[], bool] = handoff.is_own_thread
        """Whether the caller runs on this client's loop, and so must not block on it."""
        self.run_soon: Callable[[Callable[[], None]], None] = handoff.run
        """Runs something on the loop soon, from any thread, or at once in the thread of the loop."""
        self.link = link = Link(keys.address(settings.redis_url), self._link_up, self._link_lost, lines)
        self.redis_clock = RedisClock()
        self._sample_at = 0.0
        self._share = ShareOfCounter(keys, _COUNTED_AS.get(this_process().process, "calls_of_programs"))
        self.lending = Lending(self.id, keys.address(settings.redis_url), keys, signer)
        self._largest_frame = settings.out_of_line_bytes
        self._pending = pending = PendingCalls(self.lending)
        self._withdrawals = Withdrawals(keys, signer, link)
        self._deadlines = Deadlines(keys, link, pending, self._withdrawals, settings.dead_after_s)
        self._channels = CallChannels(self.id, keys, signer, link, pending, self._deadlines)
        full_queues = FullQueues(keys, link)
        self._admission = Admission(
            *(keys, link, pending, self._withdrawals, self.redis_clock, full_queues, self._sample_clock)
        )
        self._receiver = Receiver(keys, self.id, signer, link, self._accept, is_awaited=self._is_awaited)
        self._reconciler = Reconciler(keys, signer, link, self._receiver, pending, self._admission, new_id=self._new_id)
        payloads = Payloads(keys, signer, settings.out_of_line_bytes)
        self.durable = DurableCalls(
            *(settings, signer, payloads, self.id, link, full_queues),
            submissions_of=lambda call_id: self.of_call(call_id).durable.submissions,
        )
        self.of: Callable[[str], Client] = lambda _name: self
        self.of_call: Callable[[str], Client] = self.of
        self.all: Callable[[], list[Client]] = lambda: [self]
        if keys.shards > 1 and not handoff.thread:
            shards = ShardClients(self, Client._join)
            self.of, self.of_call, self.all = shards.of, shards.of_call, shards.all

    # Life cycle

    async def start(self) -> None:
        """Connect and open the inbox.

        Raises:
            BrokerUnavailable, ConfigurationError: Redis, or a hook that QSERVE_HOOKS names, cannot be used from here.
        """
        hooks = load_hooks(self.settings.hook_paths, ClientHook)
        self.hooks = HookChain(hooks) if hooks else None
        self._loop = self._handoff.open()
        self._deadlines.open(self._loop)
        await self.link.start()
        self._keeper = spawn(self._receiver.keep_alive(self._tick))

    def _join(self, settings: Settings, lines: Lines) -> "Client":
        """Make a client for another shard, which connects by itself; calls wait until it has."""
        made = Client(settings, self._handoff, lines)
        made.hooks, made._loop = self.hooks, self._loop
        made.of, made.of_call = self.of, self.of_call

        def begin() -> None:
            made._deadlines.open(self._loop)
            made.link.start_soon()
            made._keeper = spawn(made._receiver.keep_alive(made._tick))

        self.run_soon(begin)
        return made

    async def stop(self) -> None:
        """Close the inbox; calls still pending end as cancelled."""
        await asyncio.gather(*(each.stop() for each in self.all() if each is not self))
        await end(self._keeper)
        self._stopped = True
        self._admission.stop()
        self._handoff.close()
        self.durable.stop()
        for call in list(self._pending.values()):
            self._pending.settle(call, CallCancelled(STOPPED))
        sender = self.link.sender
        if sender.is_open:
            self._tell_counts()
            self._receiver.discard()
            sender.flush()
            with contextlib.suppress(BrokerUnavailable, TimeoutError):
                async with asyncio.timeout(1):
                    await sender.settle_all()
        await self.link.stop()
        self.lending.stop()

    async def _link_up(self) -> None:
        await self._receiver.open()
        self._admission.flush()
        self.durable.link_up()
        spawn(self._sample_clock())
        if self.link.losses:
            spawn(self._reconciler.run())

    def _link_lost(self) -> None:
        self.durable.link_down()
        for call in self._admission.give_back():
            self._pending.settle(call, BrokerUnavailable("Redis cannot be reached; the call was not sent"))

    def _tick(self) -> None:
        now = time.monotonic()
        self.durable.tick()
        self.lending.tick()
        self._reconciler.budget.note(self._pending.tally["accepted"], now)
        self._tell_counts()
        if now >= self._sample_at and self.link.sender.is_open:
            self._sample_at = now + SAMPLE_EVERY_S
            spawn(self._sample_clock())

    def _tell_counts(self) -> None:
        """Add what has happened since the last time to what Redis counts of all processes."""
        self._pending.troubles.send(self.sender, self.settings.keys)
        self._share.tell(self.sender, self._pending.tally["accepted"] + self.durable.submissions.accepted)

    async def _sample_clock(self) -> None:
        """Check whether the clock of Redis has jumped."""
        with contextlib.suppress(BrokerUnavailable, CommandRefused):
            if self.sender.is_open and await self.redis_clock.sample(self.sender):
                spawn(self._reconciler.run())  # what was unread in the inbox may have expired

    # What others may see of it

    @property
    def sender(self) -> Connection:
        """The connection for commands; a closed one while Redis is away."""
        return self.link.sender

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which this client runs."""
        return self._loop

    @property
    def pending(self) -> int:
        """How many calls wait for their outcome, in all shards."""
        return sum(len(each._pending) for each in self.all())

    @property
    def tally(self) -> Counter[str]:
        """How many calls were accepted, `refused` by which error, and `ended` with which outcome, in all shards."""
        return sum((each._pending.tally for each in self.all()), Counter())

    def descriptors(self) -> list[int]:
        """File descriptors of the open connections, for whoever must close them after a fork."""
        return [descriptor for each in self.all() for descriptor in each.link.descriptors()]

    # Calling

    def prepare(
        self,
        deployment: str,
        *,
        kind: int,
        method: str,
        payload: Payload | Loan,
        timeout_s: float,
        safe: bool,
        on_outcome: Callable[[Outcome], None],
        meta: Mapping[str, str] = NO_META,
    ) -> PendingCall:
        """Make a call ready to be put. From any thread.

        Args:
            payload: Packed arguments or an encoded HttpRequest, which is copied if it is large; or what was lent
                already, for this call alone.
            timeout_s: Seconds from now to its deadline.
            on_outcome: Called exactly once, on the loop.
            meta: What the hooks of this process tell the hooks of the replica.

        Raises:
            PayloadTooLarge: There is not so much memory.
        """
        call_id = self._new_id()
        loan: Loan | None = None
        if len(payload) > self._largest_frame:
            loan = payload if isinstance(payload, Loan) else self.lending.lend(payload)
            payload = loan.frame
        ttl_ms = int(timeout_s * 1000)
        call = Call(call_id, deployment, self.id, ttl_ms, kind, method, safe, payload, loan is not None)  # type: ignore[arg-type]
        if meta:
            call = with_meta(call, meta)
        return PendingCall(call_id, deployment, safe, self.signer.seal(encode(call)), loan, timeout_s, on_outcome)

    def open_channel(self, call: PendingCall) -> Channel:
        """Prepare a call for traffic beside its reply, before it is put.

        Its deadline then holds until the first data comes back, and starts anew with every sign that the replica takes
        in what it is sent.
        """
        return self._channels.open(call)

    def put(self, call: PendingCall) -> None:
        """Put a prepared call, together with the others of this tick."""
        self._pending[call.id] = call
        if self._stopped:
            self._pending.settle(call, CallCancelled(STOPPED))
            return
        self._deadlines.start(call)
        self._admission.put(call)

    def submit(self, call: PendingCall) -> None:
        """Put a prepared call from any thread."""
        if threading.get_ident() == self._handoff.thread:
            self.put(call)
        else:
            self._handoff.run_from_thread(partial(self.put, call))

    def cancel(self, call: PendingCall) -> None:
        """Cancel a call. A call that waits never reaches a replica; one that runs is cancelled there if it is safe."""
        if call.channel is not None and call.id in self._pending:
            call.channel.abort("the caller left")
        if self._pending.settle(call, CallCancelled("the call was cancelled")):
            self._withdrawals.withdraw(call)

    def withdraw(self, call: PendingCall, *, inherited: bool = False) -> None:
        """Like `cancel`, from any thread.

        Args:
            inherited: Cancel it even if it is not safe, because the call that made it was cancelled.
        """
        call.inherited = inherited
        self._handoff.run(partial(self.cancel, call))

    # What the inbox brings

    def take_other_chunks(self, take: Callable[[str, Chunk], bool]) -> None:
        """Hand chunks of calls that this process has not made to `take`, which returns whether it has taken them."""
        self._channels.on_other = take

    def _accept(self, reply: Reply) -> None:
        if reply.to != self.id:
            if reply.to != ANYONE:
                raise FrameRejected("a reply to another process")
            self.durable.watchers.take(reply)
            return
        if reply.kind == CONTROL:
            self._take_control(reply.id, decode_control(reply.payload))
            return
        if reply.kind == CHUNK:
            self._channels.take(reply.id, decode_chunk(reply.payload))
            return
        call = self._pending.get(reply.id)
        if call is None:  # timed out or cancelled: the answer is late
            if reply.out_of_line:
                self.lending.give_up(reply.payload)
        elif reply.out_of_line:
            call.entry = None  # answered: no more to be withdrawn or missed
            spawn(self._fetch(call, reply))
        else:
            self._pending.settle(call, reply)

    def _is_awaited(self) -> bool:
        return bool(self._pending or self.durable.watchers or self.on_control is not None)

    def _take_control(self, about: str, control: Control) -> None:
        if control.verb == "send":
            name, _, wanted = control.entry.partition(" ")
            self.lending.send(name, wanted)
        elif self.on_control is not None:
            self.on_control(about, control)

    async def _fetch(self, call: PendingCall, reply: Reply) -> None:
        outcome: Outcome
        try:
            reach("result-announced")
            result = await self.lending.borrow(self.link.sender, reply.payload, returns=True)
            outcome = LargeReply(reply.id, reply.kind, result)
        except ValueGone as exc:
            if call.id not in self._pending or self._reconciler.run_again(call):
                return  # else it has ended meanwhile
            text = f"the call has run, but its large result is lost: {exc}"
            outcome = BrokerUnavailable(f"{text}. It can be sent again") if call.safe else Indeterminate(text)
        except (BrokerUnavailable, FrameRejected) as exc:
            outcome = BrokerUnavailable(f"the call has run, but its large result could not be fetched: {exc}")
        self._pending.settle(call, outcome)
