"""A client whose calls run in its own process. Arguments, results and errors become bytes and back all the same."""

import asyncio
from collections.abc import Callable, Mapping

from qserve.background import end
from qserve.broker.large.lending import Loan
from qserve.calls.client import STOPPED, Client
from qserve.calls.deadlines import Deadlines
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.pending import PendingCall
from qserve.calls.withdrawing import Withdrawals
from qserve.errors import BackPressureError, CallCancelled, DeploymentNotFound
from qserve.hooks import ClientHook, HookChain, load_hooks
from qserve.settings import Settings
from qserve.wire.channel import Channel
from qserve.wire.messages import NO_META, Call, Outcome, Reply, with_meta
from qserve.wire.parts import Payload, flat
from qserve.wire.spec import DeploymentSpec
from qserve_workers.local.local_durable import LocalClock, LocalDurableCalls
from qserve_workers.local.local_replica import LocalReplica, make_channels


class LocalClient(Client):
    """Runs calls in its process, in place of putting them on queues; there is no Redis."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.replicas: dict[str, LocalReplica] = {}
        self._codec = codec_of(self)
        self._calls: dict[str, Call] = {}
        self._far_ends: dict[str, Channel] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        withdrawals = _WithdrawalsHere(settings.keys, self.signer, self.link)
        withdrawals.tasks = self._tasks
        self._deadlines = Deadlines(settings.keys, self.link, self._pending, withdrawals, settings.dead_after_s)
        self.clock = LocalClock()
        self.durable: LocalDurableCalls = LocalDurableCalls(
            *(settings, self.signer, self._codec, self.id, self.link), replicas=self.replicas, clock=self.clock
        )

    async def start(self) -> None:
        """Take calls from now on.

        Raises:
            ConfigurationError: A hook that QSERVE_HOOKS names cannot be used.
        """
        hooks = load_hooks(self.settings.hooks, ClientHook)
        self.hooks = HookChain(hooks) if hooks else None
        self._loop = self._handoff.open()
        self._deadlines.open(self._loop)

    async def stop(self) -> None:
        """End the calls that run, and the deployments."""
        await end(*self._tasks.values())
        await self.durable.end_all()
        for name in list(self.replicas):
            await self.remove(name)
        self._stopped = True
        self._handoff.close()
        for call in list(self._pending.values()):
            self._pending.settle(call, CallCancelled(STOPPED))

    async def serve(self, spec: DeploymentSpec) -> None:
        """Serve a deployment from now on, in place of the one of that name; raises what user code raised."""
        before = self.replicas.get(spec.name)
        if before is not None and before.spec.revision == spec.revision:
            if spec.user_config is not None and spec.user_config != before.spec.user_config:
                await before.code.reconfigure(spec.user_config)
            before.spec = spec
            return
        replica = LocalReplica(spec, self._codec)
        await replica.start()
        await self.remove(spec.name)
        self.replicas[spec.name] = replica

    async def remove(self, name: str) -> None:
        """Serve a deployment no more; its destructor runs."""
        replica = self.replicas.pop(name, None)
        if replica is not None:
            await replica.code.close()

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
        """Make a call ready to be put. From any thread."""
        assert not isinstance(payload, Loan)
        data = flat(payload)  # nothing is large enough to be lent
        call = Call(self._new_id(), deployment, self.id, int(timeout_s * 1000), kind, method, safe, data)
        self._calls[call.id] = with_meta(call, meta) if meta else call
        return PendingCall(call.id, deployment, safe, b"", None, timeout_s, on_outcome)

    def open_channel(self, call: PendingCall) -> Channel:
        """Prepare a call for a stream, before it is put."""
        call.channel, self._far_ends[call.id] = make_channels()
        return call.channel

    def submit(self, call: PendingCall) -> None:
        """Put a prepared call from any thread."""
        self._handoff.run(lambda: self.put(call))

    def put(self, call: PendingCall) -> None:
        """Run a prepared call."""
        sent, far_end = self._calls.pop(call.id), self._far_ends.pop(call.id, None)
        self._pending[call.id] = call
        replica = self.replicas.get(call.deployment)
        if self._stopped:
            self._pending.settle(call, CallCancelled("the client was stopped before the call ended"))
        elif replica is None:
            self._pending.refuse(call, DeploymentNotFound(f"There is no deployment {call.deployment!r} here."))
        elif replica.is_full:
            self._pending.refuse(call, BackPressureError(f"the queue of {call.deployment!r} is full"))
        else:
            self._deadlines.start(call)
            running = self._run(replica, call, sent, far_end)
            task = asyncio.get_running_loop().create_task(running, context=replica.context.copy())
            self._tasks[call.id] = task
            replica.unanswered += 1
            task.add_done_callback(lambda _: self._ended(call, replica))

    def cancel(self, call: PendingCall) -> None:
        """Cancel a call where it runs; a thread that runs it is not stopped by that."""
        if call.channel is not None and call.id in self._pending:
            call.channel.abort("the caller left")
        if self._pending.settle(call, CallCancelled("the call was cancelled")) and call.id in self._tasks:
            self._tasks[call.id].cancel()

    def _ended(self, call: PendingCall, replica: LocalReplica) -> None:
        del self._tasks[call.id]
        replica.unanswered -= 1

    async def _run(self, replica: LocalReplica, call: PendingCall, sent: Call, far_end: Channel | None) -> None:
        kind, payload = await replica.answer(sent, far_end)
        reply = Reply(call.id, self.id, kind, payload)
        # In the next tick, because the last parts of a stream are on their way until then.
        asyncio.get_running_loop().call_soon(self._pending.settle, call, reply)


class _WithdrawalsHere(Withdrawals):
    """Calls that nobody waits for any more are cancelled where they run, which is here."""

    tasks: "Mapping[str, asyncio.Task[None]]"

    def withdraw(self, call: PendingCall) -> None:
        if (task := self.tasks.get(call.id)) is not None:
            task.cancel()
