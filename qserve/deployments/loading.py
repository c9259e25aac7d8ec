"""User code that other processes load: by its import path, or as a pickle where it has none."""

import importlib
import io
import sys
import sysconfig
import threading
import traceback
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import cloudpickle
from starlette.datastructures import State

from qserve.errors import ConfigurationError
from qserve.wire.spec import Target

_importing: ContextVar[bool] = ContextVar("qserve_importing", default=False)


class Deployable:
    """What `@serve.deployment` puts in the place of user code: it holds the code, or where to load it from."""

    _code: Callable[..., Any] | None
    _target: Target | None

    @property
    def func_or_class(self) -> Callable[..., Any]:
        """The class or function; loaded only now if the deployment was read from the state."""
        if self._code is None:
            assert self._target is not None
            code = load_target(self._target)
            assert callable(code)
            self._code = code
        return self._code


def is_importing() -> bool:
    """Whether qserve is importing user code in this context, so that deploying there does nothing."""
    return _importing.get()


@contextmanager
def importing() -> Iterator[None]:
    """A block in which `deploy`, `run`, `start`, `delete` and `shutdown` do nothing."""
    token = _importing.set(True)
    try:
        yield
    finally:
        _importing.reset(token)


def unwrap(value: object) -> object:
    """The user code, if `value` is a deployment of it; otherwise the value."""
    return value.func_or_class if isinstance(value, Deployable) else value


def make_target(code: object, *, allow_pickle: bool) -> Target:
    """Where other processes find `code`: at its import path if that leads back to it, otherwise in a pickle.

    Raises:
        ConfigurationError: It has no import path, and it cannot be pickled or no pickles are allowed.
    """
    module = sys.modules.get(getattr(code, "__module__", None) or "")
    if module is not None and module.__name__ not in ("__main__", "__mp_main__"):
        qualname = _qualname_in(module, code)
        if qualname is not None:
            return Target(import_path=f"{module.__name__}:{qualname}", sys_path=_folders_of(module))
    name = getattr(code, "__qualname__", None) or repr(code)
    if not allow_pickle:
        raise ConfigurationError(
            f"{name!r} cannot be imported by other processes (it is defined in {_place(code)}), and without a key code "
            "is not sent as a pickle. Move it to the top level of a module, or set QSERVE_SECRET for every process."
        )
    try:
        # It may refer to what its own module defines.
        folders = _folders_of(module) if module is not None and module.__name__ != "__main__" else ()
        return Target(pickled=dumps(code), sys_path=tuple(dict.fromkeys((_main_folder(), *folders))))
    except Exception as exc:
        raise ConfigurationError(
            f"{name!r} cannot be pickled, because something that it refers to cannot: {type(exc).__name__}: {exc}. "
            "Define it at the top level of a module instead, so that replicas import it."
        ) from exc


def load_target(target: Target) -> object:
    """Load the user code of a target. Of a deployment, that is the class or function.

    Raises:
        ConfigurationError: It cannot be imported or unpickled; the text holds the traceback in the user's code.
    """
    for folder in reversed(target.sys_path):
        if folder not in sys.path and Path(folder).is_dir():
            sys.path.insert(0, folder)
    with importing():
        if target.import_path:
            module, _, qualname = target.import_path.partition(":")
            return unwrap(find_attribute(import_module(module), qualname))
        try:
            return unwrap(cloudpickle.loads(target.pickled))
        except Exception as exc:
            raise ConfigurationError(f"Pickled user code cannot be loaded here:\n{user_traceback(exc)}") from exc


def import_module(name: str) -> ModuleType:
    """Import a module of an application.

    Raises:
        ConfigurationError: There is no module of that name, or it raised while it was imported.
    """
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(exc.name + ".")):
            raise ConfigurationError(f"Could not import module {name!r}: no module named {exc.name!r}.") from exc
        raise ConfigurationError(f"Could not import module {name!r}:\n{user_traceback(exc)}") from exc
    except Exception as exc:
        raise ConfigurationError(f"Could not import module {name!r}:\n{user_traceback(exc)}") from exc


def find_attribute(module: ModuleType, qualname: str) -> object:
    """The object at a dotted name inside a module.

    Raises:
        ConfigurationError: There is no such object.
    """
    found: object = module
    for part in qualname.split("."):
        try:
            found = getattr(unwrap(found), part)
        except AttributeError:
            raise ConfigurationError(f"Attribute {qualname!r} not found in module {module.__name__!r}.") from None
    return found


def user_traceback(exc: BaseException) -> str:
    """The traceback of an exception, without the frames of this module and of the import machinery."""
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if frame.filename != __file__
        and not frame.filename.startswith("<frozen importlib")
        and Path(frame.filename).parent.name != "importlib"
    ]
    head = ["Traceback (most recent call last):\n"] if frames else []
    return "".join([*head, *traceback.format_list(frames), *traceback.format_exception_only(exc)]).rstrip()


def dumps(value: object) -> bytes:
    """Pickle with cloudpickle, which is taught here to pickle Starlette and FastAPI applications."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _restore_state(state: State, values: dict[str, Any]) -> None:
    state._state.update(values)


def _reduce_state(state: State) -> tuple[Any, ...]:
    return State, (), dict(state._state), None, None, _restore_state


def _reduce_lock(lock: object) -> tuple[Any, ...]:
    return (threading.RLock if isinstance(lock, type(threading.RLock())) else threading.Lock), ()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    # A State answers every attribute from a dict that is not there yet while it is being unpickled, and FastAPI keeps
    # locks in its included routers; both pickle as fresh objects.
    dispatch_table: ClassVar[ChainMap[Any, Any]] = ChainMap(
        {
            State: _reduce_state,
            type(threading.Lock()): _reduce_lock,
            type(threading.RLock()): _reduce_lock,
        },
        cloudpickle.Pickler.dispatch_table,
    )


def _qualname_in(module: ModuleType, code: object) -> str | None:
    qualname = getattr(code, "__qualname__", "")
    if qualname and "<" not in qualname:
        try:
            if unwrap(find_attribute(module, qualname)) is code:
                return str(qualname)
        except ConfigurationError:
            pass
    return next((name for name, value in vars(module).items() if unwrap(value) is code), None)


def _folders_of(module: ModuleType) -> tuple[str, ...]:
    """The folder to have on `sys.path` for importing the module, unless it is installed."""
    top = sys.modules[module.__name__.partition(".")[0]]
    package_folders = list(getattr(top, "__path__", []))
    place = Path(package_folders[0]) if package_folders else Path(getattr(top, "__file__", None) or "")
    folder = place.resolve().parent
    installed = (Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib"))
    return () if any(folder.is_relative_to(path) for path in installed) else (str(folder),)


def _main_folder() -> str:
    main = getattr(sys.modules["__main__"], "__file__", None)
    return str(Path(main).resolve().parent if main else Path.cwd())


def _place(code: object) -> str:
    if "<locals>" in getattr(code, "__qualname__", ""):
        return "a function"
    return f"module {getattr(code, '__module__', '?')!r}"
