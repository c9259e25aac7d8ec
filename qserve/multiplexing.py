"""`@serve.multiplexed`: one replica holds several models, and lets go of those that were not used for longest."""

import asyncio
import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import wraps
from types import FunctionType
from typing import Any, Final, Protocol, TypeVar, overload
from weakref import WeakSet, ref

from qserve.background import spawn
from qserve.context import (
    ReplicaContext,
    get_replica_context,
    in_replica,
    model_here,
    model_watcher,
    shared_context,
)
from qserve.telemetry.user_metrics import OwnCounter
from qserve.user_code.user_objects import forget_destructor, kept_in

logger = logging.getLogger(__name__)

R = TypeVar("R")

_UNLIMITED: Final = -1
_MOST: Final = "_qserve_most_models"
"""The attribute of a loader that says how many models it keeps."""
_asked: Final = OwnCounter("qserve_models_asked_for", "Times that a call asked for a model.")
_loaded: Final = OwnCounter("qserve_models_loaded", "Times that a model was loaded, because the replica had it not.")
_let_go: Final = OwnCounter("qserve_models_let_go", "Times that a model left, because there was no room for another.")
_all_models: "Final[WeakSet[_Models]]" = WeakSet()


def get_multiplexed_model_id() -> str:
    """The model that the running call is for: `handle.options(multiplexed_model_id=...)`, or the header
    `serve_multiplexed_model_id`; "" if the caller named none. In a batch, that of all its calls; in a loader, the one
    that it loads."""
    return model_here()


class LoaderDecorator(Protocol):
    """The decorator that `@serve.multiplexed(...)` returns."""

    def __call__(self, function: Callable[..., Coroutine[Any, Any, R]], /) -> Callable[..., Coroutine[Any, Any, R]]: ...


@overload
def multiplexed(function: Callable[..., Coroutine[Any, Any, R]], /) -> Callable[..., Coroutine[Any, Any, R]]: ...
@overload
def multiplexed(*, max_num_models_per_replica: int = 3) -> LoaderDecorator: ...
def multiplexed(function: Any = None, /, *, max_num_models_per_replica: int = 3) -> Any:
    """Keep what an `async def` loader returns, for so many models; the least recently used one leaves first.

    The loader takes the id of a model (and `self`, if it is a method). A model is loaded once, however many calls wait
    for it; an error of the loader is raised in each of them. The loader belongs to none of them: it goes on when they
    are withdrawn. An `async def __del__` of a model is awaited when it leaves, and when the replica ends; an ordinary
    one runs when nobody uses the model any more.

    Args:
        max_num_models_per_replica: How many models a replica keeps; -1: all.

    Raises:
        TypeError, ValueError: No such function, or an impossible number.
    """
    if not isinstance(max_num_models_per_replica, int):
        raise TypeError("max_num_models_per_replica must be an integer.")
    if max_num_models_per_replica != _UNLIMITED and max_num_models_per_replica < 1:
        raise ValueError("max_num_models_per_replica must be positive, or -1 for no limit.")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError("@serve.multiplexed expects an `async def` function or method, which loads a model.")
        names = list(inspect.signature(function).parameters)
        takes_self = names[:1] == ["self"]
        if len(names) != 1 + takes_self:
            raise TypeError("@serve.multiplexed expects a function with one parameter besides `self`: the model's id.")
        return _loading(function, max_num_models_per_replica, takes_self=takes_self)

    return decorate if function is None else decorate(function)


def room_for_models(code: object) -> int | None:
    """How many models a replica of a class or function keeps; None where it has no loader."""
    named: list[Any] = []
    for each in inspect.getmro(code) if isinstance(code, type) else ():
        named += vars(each).values()
    if isinstance(code, FunctionType):
        named += code.__globals__.values()
    rooms = [vars(each)[_MOST] for each in named if isinstance(each, FunctionType) and _MOST in vars(each)]
    return min(rooms, default=None)


def _loading(function: Callable[..., Any], most: int, *, takes_self: bool) -> Callable[..., Any]:
    loader = _Loader(function, most, takes_self=takes_self)

    @wraps(function)
    async def load(*args: Any) -> Any:
        return await loader.get(*args)

    setattr(load, _MOST, sys.maxsize if most == _UNLIMITED else most)
    return load


async def unload_models() -> None:
    """Let go of the models of the replica in which this runs, which ends; those that are being loaded are left."""
    replica = get_replica_context()
    unloading = [task for models in list(_all_models) if models.belong_to(replica) for task in models.let_go_of_all()]
    if unloading:
        await asyncio.wait(unloading)


class _Loader:
    """One decorated function: finds the models that it has loaded for an instance."""

    def __init__(self, function: Callable[..., Any], most: int, *, takes_self: bool) -> None:
        self._function = function
        self._most = most
        self._takes_self = takes_self
        self._shared: _Models | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shared": None}  # models stay where they are when code is sent

    async def get(self, *args: Any) -> Any:
        owner = args[:1] if self._takes_self else ()
        ids = args[len(owner) :] or (model_here(),)
        if len(ids) != 1 or not isinstance(ids[0], str):
            raise TypeError(f"{self._function.__name__}() takes the id of a model, a string.")
        if not ids[0]:
            raise ValueError("The id of a model cannot be empty: did the caller name one?")
        models = self._models_of(owner[0]) if owner else self._models_of_function()
        return await models.get(ids[0], lambda: self._function(*owner, ids[0]))

    def _models_of_function(self) -> "_Models":
        if self._shared is None:
            self._shared = _Models(self._most)
        return self._shared

    def _models_of(self, instance: Any) -> "_Models":
        kept = kept_in(instance, "@serve.multiplexed")
        models: _Models | None = kept.get(self)  # not by its name, which a method of a base class has too
        if models is None:
            models = kept[self] = _Models(self._most)
        return models


class _Model(asyncio.Future[Any]):
    """A model that is there, or will be."""

    waiting = 0
    """How many calls wait for it."""


class _Models:
    """The models of one loader. Belongs to an event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._watcher = model_watcher()
        self._replica = ref(get_replica_context()) if in_replica() else None
        _all_models.add(self)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._models

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    @property
    def room(self) -> int:
        """How many more models there may be before one leaves."""
        return sys.maxsize if self._most == _UNLIMITED else self._most - len(self._models)

    def belong_to(self, replica: ReplicaContext) -> bool:
        """Whether they were loaded there."""
        return self._replica is not None and self._replica() is replica

    def _changed(self, model_id: str) -> None:
        if self._watcher is not None:
            self._watcher.changed(self, model_id)

    async def get(self, model_id: str, load: Callable[[], Awaitable[Any]]) -> Any:
        _asked.count()
        model = self._models.get(model_id)
        if model is None:
            model = self._begin(model_id, load)
        else:
            self._models.move_to_end(model_id)
        if not model.done():
            model.waiting += 1
            try:
                await asyncio.wait([model])  # which does not end with a call that is withdrawn
            finally:
                model.waiting -= 1
        try:
            return model.result()
        finally:
            del model  # else its error would hold this frame, and it the error

    def _begin(self, model_id: str, load: Callable[[], Awaitable[Any]]) -> _Model:
        leaving = []
        while self.room <= 0:
            leaving.append(self._let_go(next(iter(self._models))))
        _loaded.count()
        model = self._models[model_id] = _Model()
        self._changed(model_id)
        # It belongs to all calls that come to wait for it, so the deadline of none of them applies.
        shared_context(model_id).run(spawn, self._load(model_id, model, leaving, load))
        return model

    async def _load(
        self, model_id: str, model: _Model, leaving: list[asyncio.Task[None]], load: Callable[[], Awaitable[Any]]
    ) -> None:
        try:
            if leaving:
                await asyncio.wait(leaving)
            model.set_result(await load())
        except BaseException as exc:  # SystemExit too, which would end the loop here
            self._failed(model_id, model, exc)
            if _is_cancelled(exc):
                raise
        finally:
            del model  # else it would hold its error, and the error would hold it

    def _failed(self, model_id: str, model: _Model, error: BaseException) -> None:
        if self._models.get(model_id) is model:
            del self._models[model_id]
            self._changed(model_id)
        if isinstance(error, asyncio.CancelledError):
            model.cancel()
            return
        model.set_exception(error)
        if not model.waiting:
            model.exception()  # asyncio would say something less plain about it
            logger.error(
                "Model %r could not be loaded. No call waits for it; the next one that does tries again.",
                model_id,
                exc_info=error,
            )

    def let_go_of_all(self) -> list[asyncio.Task[None]]:
        """Keep none of those that are there; gives what is to be awaited."""
        return [self._let_go(model_id) for model_id, model in list(self._models.items()) if model.done()]

    def _let_go(self, model_id: str) -> asyncio.Task[None]:
        model = self._models.pop(model_id)
        _let_go.count()
        self._changed(model_id)
        return shared_context(model_id).run(spawn, _unload(model_id, model))


async def _unload(model_id: str, model: _Model) -> None:
    """Run the destructor of a model that leaves, if it has to be awaited."""
    if not model.done():
        await asyncio.wait([model])
    if model.cancelled() or model.exception() is not None:
        return
    destructor = getattr(model.result(), "__del__", None)
    if not inspect.iscoroutinefunction(destructor):
        return
    try:
        await destructor()
    except BaseException as exc:  # SystemExit too, which would end the loop here
        if _is_cancelled(exc):
            raise
        logger.error("Exception in __del__ of model %r, which has left all the same", model_id, exc_info=exc)
    forget_destructor(model.result())


def _is_cancelled(error: BaseException) -> bool:
    """Whether somebody else ends the running task."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
