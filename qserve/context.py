"""What user code can ask about the replica it runs in. This module owns the only per-process state of a replica."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from qserve.errors import QServeError
from qserve.hooks import BatchHook, HookChain


class Nested(Protocol):
    """A call made by a call."""

    def inherit_cancellation(self) -> None:
        """Withdraw it because the call that made it was cancelled. May be called from any thread."""

    @property
    def awaited(self) -> str:
        """Its id while somebody waits for it without a limit of time, else ""."""


@dataclass(eq=False, slots=True)
class CallInfo:
    """The call that is being run.

    Attributes:
        request_id: The id of the request that it is a part of, as the client knows it.
        attempt: 1 for its first delivery, 2 for its second, ...
        deadline: When it has to end, on `time.monotonic`; None once it streams, which may take as long as it takes.
        nested: The calls it has made that have not ended.
        lineage: The ids of the calls that it is a part of, and its own.
        model_id: The model that it is for; "" if its caller named none.
        app_error: What an ASGI application raised, although its response may be whole.
    """

    request_id: str
    attempt: int = 1
    deadline: float | None = None
    nested: set[Nested] = field(default_factory=set)
    lineage: str = ""
    model_id: str = ""
    app_error: BaseException | None = None

    @property
    def call_id(self) -> str:
        """The id of the call itself."""
        return self.lineage.rpartition(" ")[2] or self.request_id

    def limit(self, timeout_s: float) -> float:
        """How long a call made by this one may take."""
        left = timeout_s if self.deadline is None else min(timeout_s, self.deadline - time.monotonic())
        return max(left, 0.001)

    def cancel_nested(self) -> None:
        """Withdraw the calls that this call has made and that have not ended."""
        for call in list(self.nested):
            call.inherit_cancellation()


current_call: ContextVar[CallInfo | None] = ContextVar("qserve_current_call", default=None)
"""Set by the replica around each call; threads of the replica see it too."""


def is_last_attempt() -> bool:
    """Whether the running durable call is not tried again if it fails; False in calls of other kinds."""
    return bool(getattr(current_call.get(), "is_last", False))


_shared_model: ContextVar[str] = ContextVar("qserve_shared_model", default="")
"""The model that a running batch is for, or that is being loaded."""


def model_here() -> str:
    """The model that the running call, batch or loader is for; "" if there is none."""
    call = current_call.get()
    return call.model_id if call is not None else _shared_model.get()


@dataclass(frozen=True)
class ReplicaRank:
    """The number of a replica among those of its deployment, from 0.

    Each version of a deployment counts by itself. A replica that ends leaves its number to its successor.

    Attributes:
        rank, local_rank: Its number on its node.
        node_rank: 0: nodes do not know each other.
    """

    rank: int = 0
    node_rank: int = 0
    local_rank: int = 0


@dataclass(frozen=True)
class ReplicaContext:
    """The replica in which this code runs.

    Attributes:
        deployment: Name of the deployment, within its application.
        replica_tag: "<deployment>#<random>".
        servable_object: The user's instance (in its own constructor: not yet complete), or the function.
        app_name: The application that the deployment belongs to; "" if it was deployed by itself.
        world_size: How many replicas the deployment is to have, as deployed.
        rank: Its number among them.
    """

    deployment: str
    replica_tag: str
    servable_object: Any
    app_name: str = ""
    world_size: int = 1
    rank: ReplicaRank = ReplicaRank()

    @property
    def replica_id(self) -> str:
        """What tells this replica from others: its tag."""
        return self.replica_tag

    @property
    def request_id(self) -> str | None:
        """The id of the request that led to this call: `X-Request-Id`, or the id of the first call; None outside."""
        call = current_call.get()
        return call.request_id if call is not None else None

    def report_progress(self, value: object) -> None:
        """Tell those who follow the call how far it has come; without effect in a call that is not durable.

        Args:
            value: What `ref.progress()` gives, and the events over HTTP: anything a call could return, up to 64 KiB.
        """
        report = getattr(current_call.get(), "report", None)
        if report is not None:
            report(value)

    @property
    def attempt(self) -> int:
        """1 unless the call was taken over from a replica that died under it."""
        call = current_call.get()
        return call.attempt if call is not None else 1


_replica_of_task: ContextVar[ReplicaContext | None] = ContextVar("qserve_replica", default=None)
"""Tells replicas apart that share a process, in tests of applications; see `qserve.testing.local`."""
_variables_of_task: ContextVar[Context | None] = ContextVar("qserve_replica_variables", default=None)
"""Those of this replica; see `set_replica_context`."""


class ModelShelf(Protocol):
    """The models that one loader of a replica holds, those it is loading too."""

    def __contains__(self, model_id: object, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    @property
    def room(self) -> int:
        """How many more it can take in before one has to leave."""


class ModelWatcher(Protocol):
    """Who wants to know which models a replica holds."""

    def changed(self, shelf: ModelShelf, model_id: str) -> None:
        """A loader has taken in a model, or let go of it."""


class _ReplicaHere:
    replica: ReplicaContext | None = None
    variables: Context | None = None
    batch_hooks: HookChain[BatchHook] | None = None
    batch_sizes: ClassVar[Counter[int]] = Counter()
    model_watcher: ModelWatcher | None = None


def set_replica_context(context: ReplicaContext | None, variables: Context | None = None) -> None:
    """Make this process a replica, or with None no longer one. Only the worker calls this.

    Args:
        variables: The context variables with which each call begins.
    """
    _ReplicaHere.replica = context
    _ReplicaHere.variables = variables
    _replica_of_task.set(context)
    _variables_of_task.set(variables)


def shared_context(model: str) -> Context:
    """A context for work that belongs to no single call, such as a batch: what modules and constructors have set holds
    there, and what a call has set does not. Outside of a replica it is a copy of the current one.

    Args:
        model: What `model_here` gives there.
    """
    variables = _variables_of_task.get()
    if variables is None:
        variables = _ReplicaHere.variables
    context = copy_context() if variables is None else variables.copy()
    context.run(_belong_to_no_call, model)
    return context


def _belong_to_no_call(model: str) -> None:
    current_call.set(None)
    _shared_model.set(model)


def set_model_watcher(watcher: ModelWatcher) -> None:
    """Tell it about the models of this process. Only the worker calls this, before user code is there."""
    _ReplicaHere.model_watcher = watcher


def model_watcher() -> ModelWatcher | None:
    """Who is to be told about the models of this process, where anybody is."""
    return _ReplicaHere.model_watcher


def batch_sizes() -> Counter[int]:
    """How many batches of each size have run in this process."""
    return _ReplicaHere.batch_sizes


def set_batch_hooks(hooks: Sequence[BatchHook]) -> None:
    """Run these around the batches of this process. Only the worker calls this, before user code is there."""
    _ReplicaHere.batch_hooks = HookChain(hooks) if hooks else None


def batch_hooks() -> HookChain[BatchHook] | None:
    """What is to be run around the batches of this process, where there is anything."""
    return _ReplicaHere.batch_hooks


def in_replica() -> bool:
    """Whether this process is a replica."""
    return _replica_of_task.get() is not None or _ReplicaHere.replica is not None


def get_replica_context() -> ReplicaContext:
    """The replica in which this code runs. May be called in the constructor, too.

    Raises:
        QServeError: This process is no replica.
    """
    replica = _replica_of_task.get() or _ReplicaHere.replica
    if replica is None:
        raise QServeError("`serve.get_replica_context()` may only be called from within a replica of a deployment.")
    return replica
