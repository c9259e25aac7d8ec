"""Hooks: code of your own around every call, where it is made, where HTTP comes in, and where it is run.

A hook is a class that derives from `ClientHook`, `GatewayHook`, `ReplicaHook` or `BatchHook`. The setting
QSERVE_HOOKS names hooks by import path, `module:Class`, separated by commas; each process that finds the setting in its
environment makes one object of each class when it starts and runs the methods around each of its calls. With no hooks
a call costs nothing more.

What a hook of a caller puts into `meta` travels with the call, under its signature, to the hooks of the replica.
"""

import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, Literal, TypeVar

from qserve.errors import ConfigurationError

logger = logging.getLogger(__name__)

CallKind = Literal["call", "stream", "http", "websocket"]
"""A call for one value; a call for a stream of values; an HTTP request; a WebSocket."""


@dataclass(frozen=True, slots=True)
class ClientCall:
    """A call that this process makes through a handle.

    Attributes:
        deployment: Name of the deployment that is called.
        method: Name of the method, "" for `__call__`.
        kind: What is asked for.
        durable: Whether the call is submitted to be answered later.
        meta: Travels with the call. `before` may add entries; keys and values are text, 8 KiB in all at most.
    """

    deployment: str
    method: str
    kind: CallKind
    durable: bool = False
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GatewayRequest:
    """A request that came in over HTTP and belongs to a deployment.

    Attributes:
        deployment: Name of the deployment whose route it matches.
        request_id: What the response's header `X-Request-Id` says.
        scope: The ASGI scope, with the headers as the client has sent them. Read it, do not change it.
        durable: Whether the client asked for the response later.
        route_prefix: That route.
        meta: Travels with the call. `before` may add entries; keys and values are text, 8 KiB in all at most.
    """

    deployment: str
    request_id: str
    scope: Mapping[str, Any]
    durable: bool = False
    meta: dict[str, str] = field(default_factory=dict)
    route_prefix: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaCall:
    """A call that a replica is about to run.

    Attributes:
        call_id: Its id.
        deployment: Name of the deployment.
        method: Name of the method, "" for `__call__`.
        kind: What is asked for.
        attempt: 1 for the first delivery of the call, 2 for its second, and so on.
        durable: Whether the call has a record, which gets its answer.
        meta: What the caller's hooks have put there. Read it, do not change it.
        waited_s: How long it has been in the queue.
    """

    call_id: str
    deployment: str
    method: str
    kind: CallKind
    attempt: int
    durable: bool
    meta: Mapping[str, str]
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls of a function of `@serve.batch` that run as one.

    Attributes:
        deployment: Name of the deployment.
        function: Name of the function.
        calls: The meta that `joins` has made for each of them.
    """

    deployment: str
    function: str
    calls: Sequence[Mapping[str, Any]]


class ClientHook:
    """What surrounds the calls that a process makes through handles, in scripts, servers and replicas."""

    def wants(self, deployment: str) -> bool:
        """Whether the hook is to be run around the call that is about to be made. Runs where the call is made."""
        return True

    def before(self, call: ClientCall) -> Any:
        """Runs where the call is made, in the caller's thread and context, before the arguments are packed.

        For a schedule it runs once, where `serve.schedule` is called; each call of the schedule carries that meta.

        Returns:
            Anything: `after` or `error` get it back.
        """

    def after(self, call: ClientCall, state: Any) -> None:
        """Runs once a result has arrived or, for a durable call or a schedule, once it is submitted.

        It may run in any thread and must not block.
        """

    def error(self, call: ClientCall, state: Any, error: BaseException) -> None:
        """Runs once the call has ended without a result. Otherwise like `after`."""


class GatewayHook:
    """What surrounds the requests that a gateway puts on queues."""

    def wants(self, scope: Mapping[str, Any]) -> bool:
        """Whether the hook is to be run around a request. One that no hook wants costs next to nothing more."""
        return True

    def before(self, request: GatewayRequest) -> Any:
        """Runs on the gateway's event loop before the request is put on the queue. Must not block.

        Returns:
            Anything: `after` or `error` get it back.
        """

    def after(self, request: GatewayRequest, state: Any, status: int) -> None:
        """Runs once the response has been sent, whatever its status. Must not block.

        Args:
            status: The HTTP status; of a WebSocket 101, or the status of its denial.
        """

    def error(self, request: GatewayRequest, state: Any, error: BaseException) -> None:
        """Runs instead of `after` when no whole response was sent: the client left, or a stream broke off."""


class ReplicaHook:
    """What surrounds the calls that a replica runs."""

    needs_meta = False
    """Whether `wants` is only ever true of calls that carry meta. Then it is not asked about others."""

    def wants(self, meta: Mapping[str, str]) -> bool:
        """Whether the hook is to be run around a call, given what the caller's hooks have put into its meta."""
        return True

    def before(self, call: ReplicaCall) -> Any:
        """Runs in the context in which the user's code then runs, so that context variables set here are seen there.

        It runs on the replica's event loop, also for `def` methods, which then run on another thread. Must not block.

        Returns:
            Anything: `after` or `error` get it back.
        """

    def after(self, call: ReplicaCall, state: Any) -> None:
        """Runs in the context of `before` once the user's code has returned or, for a stream, ended. Must not block."""

    def error(self, call: ReplicaCall, state: Any, error: BaseException) -> None:
        """Runs once the user's code has raised, was cancelled or timed out. Otherwise like `after`."""


class BatchHook:
    """What surrounds the batches of `@serve.batch` in a replica."""

    def wants(self) -> bool:
        """Always."""
        return True

    def joins(self, meta: dict[str, Any]) -> None:
        """Runs where a call joins a batch, in the call's context. Must not block.

        Args:
            meta: What it adds here, the batch has in `calls`.
        """

    def before(self, batch: Batch) -> Any:
        """Runs in the context in which the batch then runs. Must not block.

        Returns:
            Anything: `after` or `error` get it back.
        """

    def after(self, batch: Batch, state: Any) -> None:
        """Runs in the context of `before` once the batch has its results. Must not block."""

    def error(self, batch: Batch, state: Any, error: BaseException) -> None:
        """Runs once the function has raised. Otherwise like `after`."""


Hook = TypeVar("Hook", ClientHook, GatewayHook, ReplicaHook, BatchHook)


def load_hooks(paths: str, kind: type[Hook]) -> tuple[Hook, ...]:
    """The hooks of one kind among those that QSERVE_HOOKS names, in the order named.

    Args:
        paths: `module:Class`, separated by commas; modules are also looked for in the current directory.

    Raises:
        ConfigurationError: One of them cannot be imported or made, or is no hook.
    """
    named = [_load(path.strip()) for path in paths.split(",") if path.strip()]
    return tuple(hook for hook in named if isinstance(hook, kind))


@cache
def _load(path: str) -> object:
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        hook = pkgutil.resolve_name(path)
        if isinstance(hook, type):
            hook = hook()
    except ConfigurationError:
        raise
    except Exception as exc:
        raise ConfigurationError(
            f"QSERVE_HOOKS names {path!r}, which cannot be used: {type(exc).__name__}: {exc}. "
            "Write module:Class, where the class takes no arguments and this process can import the module."
        ) from exc
    if not isinstance(hook, ClientHook | GatewayHook | ReplicaHook | BatchHook):
        raise ConfigurationError(
            f"QSERVE_HOOKS names {path!r}, which is no hook: derive its class from qserve.hooks.ClientHook, "
            "GatewayHook, ReplicaHook or BatchHook."
        )
    return hook


class HookChain(Generic[Hook]):
    """Hooks of one kind that are run around calls, and whose own failures harm no call.

    `before` goes through the hooks in order, `after` and `error` in reverse. What a hook raises is logged, once for
    each hook and method, and the hook counts as having returned None.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks: tuple[Hook, ...] = tuple(hooks)
        self._reported: set[tuple[Hook, str]] = set()
        everything = {ClientHook.wants, GatewayHook.wants, ReplicaHook.wants, BatchHook.wants}
        self._choosy = any(type(hook).wants not in everything for hook in hooks)
        self.needs_meta = all(isinstance(hook, ReplicaHook) and hook.needs_meta for hook in hooks)
        """Whether no hook wants a call that carries no meta, so that there is nothing to `choose` for it."""
        self.choose: Callable[..., HookChain[Hook] | None] = self._choose_one if len(hooks) == 1 else self._choose_some
        """Those that want the call, the request or the batch of which these are the facts; None if none does."""

    def _choose_one(self, *facts: Any) -> "HookChain[Hook] | None":
        try:
            return self if self._hooks[0].wants(*facts) else None
        except BaseException as exc:
            self._report(self._hooks[0], "wants", exc)
            return self

    def _choose_some(self, *facts: Any) -> "HookChain[Hook] | None":
        if not self._choosy:
            return self
        try:
            chosen = [hook for hook in self._hooks if hook.wants(*facts)]
        except BaseException as exc:
            self._report(self._hooks[0], "wants", exc)
            return self
        if len(chosen) == len(self._hooks):
            return self
        if not chosen:
            return None
        chain = HookChain(chosen)
        chain._reported = self._reported
        return chain

    def joins(self) -> dict[str, Any]:
        """Run every `joins`; the meta goes to the batch."""
        meta: dict[str, Any] = {}
        for hook in self._hooks:
            if isinstance(hook, BatchHook):
                try:
                    hook.joins(meta)
                except BaseException as exc:
                    self._report(hook, "joins", exc)
        return meta

    def before(self, subject: Any) -> tuple[Any, ...]:
        """Run every `before`; the states go to `after` or `error`."""
        states: tuple[Any, ...] = ()
        for hook in self._hooks:
            state = None
            try:
                state = hook.before(subject)
            except BaseException as exc:
                self._report(hook, "before", exc)
            states += (state,)
        return states

    def after(self, subject: Any, states: tuple[Any, ...], *facts: Any) -> None:
        """Run every `after` with its own state."""
        for hook, state in zip(self._hooks[::-1], states[::-1], strict=True):
            try:
                hook.after(subject, state, *facts)
            except BaseException as exc:
                self._report(hook, "after", exc)

    def error(self, subject: Any, states: tuple[Any, ...], error: BaseException) -> None:
        """Run every `error` with its own state."""
        for hook, state in zip(self._hooks[::-1], states[::-1], strict=True):
            try:
                hook.error(subject, state, error)
            except BaseException as exc:
                self._report(hook, "error", exc)

    def _report(self, hook: Hook, method: str, error: BaseException) -> None:
        if (hook, method) not in self._reported:
            self._reported.add((hook, method))
            logger.error(
                "the hook %s.%s raised in %s(); the call goes on, and this is not logged again",
                *(type(hook).__module__, type(hook).__qualname__, method),
                exc_info=error,
            )


_MAX_META_BYTES = 8 * 1024


def checked_meta(meta: dict[str, str]) -> dict[str, str]:
    """What of a call's meta is sent: all of it, or nothing, with a warning, if a hook broke the rules."""
    try:
        size = sum(len(key.encode()) + len(value.encode()) for key, value in meta.items())
    except (AttributeError, UnicodeEncodeError):
        logger.warning("the meta of a call is left out: its keys and values must be text that UTF-8 can encode")
        return {}
    if size > _MAX_META_BYTES:
        logger.warning("the meta of a call is left out: it has %d bytes, and the limit is %d", size, _MAX_META_BYTES)
        return {}
    return meta
