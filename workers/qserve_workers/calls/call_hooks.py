"""The hooks of a replica around the calls that it runs."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from qserve.broker.server.clock import RedisClock
from qserve.hooks import CallKind, HookChain, ReplicaCall, ReplicaHook
from qserve.wire.call_record import DurableCall
from qserve.wire.messages import HTTP, PYTHON, STREAM, WEBSOCKET, WITHIN
from qserve_workers.calls.running import RunningCall
from qserve_workers.user.user_entry import what_was_raised

RunsCall = Callable[..., Awaitable[tuple[int, Any]]]
"""Runs a call, its first argument, and gives kind and payload of the reply."""

_KINDS: Final[dict[int, CallKind]] = {PYTHON: "call", STREAM: "stream", HTTP: "http", WEBSOCKET: "websocket"}


def with_hooks(run: RunsCall, hooks: HookChain[ReplicaHook] | None, clock: RedisClock) -> tuple[RunsCall, RunsCall]:
    """The function with hooks around it, for calls without meta and for those with it.

    Where no hook can want a call, it is the function itself, so that it costs nothing more.
    """
    if hooks is None:
        return run, run

    def run_as_chosen(running: RunningCall, *arguments: Any) -> Awaitable[tuple[int, Any]]:
        # Not async: a call that no hook wants has one frame less.
        chain = hooks.choose(running.call.meta)
        return run(running, *arguments) if chain is None else run_with_hooks(chain, running, *arguments)

    async def run_with_hooks(chain: HookChain[ReplicaHook], running: RunningCall, *arguments: Any) -> tuple[int, Any]:
        call = _described(running, clock)
        states = chain.before(call)
        try:
            answer = await run(running, *arguments)
        except BaseException as exc:
            chain.error(call, states, running.info.app_error or what_was_raised(exc))
            raise
        if running.info.app_error is not None:
            chain.error(call, states, running.info.app_error)
        else:
            chain.after(call, states)
        return answer

    return run if hooks.needs_meta else run_as_chosen, run_as_chosen


def _described(running: RunningCall, clock: RedisClock) -> ReplicaCall:
    call = running.call
    return ReplicaCall(
        call_id=call.id,
        deployment=call.deployment,
        method=call.method,
        kind=_KINDS.get(call.kind, "stream"),
        attempt=running.info.attempt,
        durable=isinstance(call, DurableCall),
        meta={name: text for name, text in call.meta.items() if name != WITHIN},
        waited_s=max(0.0, clock.age_ms(running.entry.time_ms) / 1000),
    )
