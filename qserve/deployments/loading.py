"""User code that other processes load: by its import path, or as a pickle where it has none."""

import importlib
import inspect
import logging
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from qserve.deployments.driver_script import MAIN, is_script, main_folder, run_script, script_import_path
from qserve.deployments.pickled_code import dumps, loads
from qserve.errors import ConfigurationError
from qserve.wire.spec import Target

logger = logging.getLogger(__name__)

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

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        """The class itself, where a deployment is named as a base class."""
        code = self.func_or_class
        if not inspect.isclass(code):
            name = getattr(code, "__name__", repr(code))
            raise TypeError(f"The deployed {name!r} is a function; a class cannot be derived from it.")
        return (code,)

    def __instancecheck__(self, instance: object) -> bool:
        code = self.func_or_class
        return inspect.isclass(code) and isinstance(instance, code)

    if not TYPE_CHECKING:  # else every misspelled name would be right

        def __getattr__(self, name: str) -> Any:
            """Attributes of the class or function, as if it were not decorated."""
            if not name.startswith("_"):
                try:
                    return getattr(self.func_or_class, name)
                except AttributeError:
                    pass
            raise AttributeError(
                f"Deployment has no attribute {name!r}, nor has the code that it serves (its func_or_class). "
                "Attributes of instances are in the replicas: call a method through get_handle().",
                name=name,
                obj=self,
            )


def is_importing() -> bool:
    """Whether qserve is importing user code in this context, so that deploying there does nothing."""
    return _importing.get()


def is_at_top_level(frame: FrameType) -> bool:
    """Whether code runs because its module is imported: at the top level of one that is not the script."""
    return frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != MAIN


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
    if module is not None and module.__name__ not in (MAIN, "__mp_main__"):
        qualname = _qualname_in(module, code)
        if qualname is not None:
            return Target(import_path=f"{module.__name__}:{qualname}", sys_path=_folders_of(module))
    name = getattr(code, "__qualname__", None) or repr(code)
    if not allow_pickle:
        by_script = _target_in_script(code)
        if by_script is None:
            raise ConfigurationError(
                f"{name!r} cannot be imported by other processes (it is defined in {_place(code)}), and without a key "
                "code is not sent as a pickle. Move it to the top level of a module, or set QSERVE_SECRET for every "
                f"process.{_advice_for_scripts(code)}"
            )
        return by_script
    try:
        # It may refer to what its own module defines.
        folders = _folders_of(module) if module is not None and module.__name__ != MAIN else ()
        return Target(pickled=dumps(code), sys_path=tuple(dict.fromkeys((main_folder(), *folders))))
    except Exception as exc:
        by_script = _target_in_script(code)
        if by_script is None:
            raise ConfigurationError(
                f"{name!r} cannot be pickled, because something that it refers to cannot: {exc}. "
                "Define it at the top level of a module instead, so that replicas import it."
                f"{_advice_for_scripts(code)}"
            ) from exc
        logger.info("%r cannot be pickled (%s): replicas run its script, without the main block", name, exc)
        return by_script


def _target_in_script(code: object) -> Target | None:
    """A target that runs the script again, where that is possible."""
    if getattr(code, "__module__", None) != MAIN:
        return None
    qualname = _qualname_in(sys.modules[MAIN], code)
    import_path = None if qualname is None else script_import_path(qualname)
    return None if import_path is None else Target(import_path=import_path, sys_path=(main_folder(),))


def _advice_for_scripts(code: object) -> str:
    if getattr(code, "__module__", None) != MAIN:
        return ""
    return (
        f" In a script it is enough to define it outside of `if __name__ == {MAIN!r}:` and to put what starts and "
        "deploys into that block: then replicas run the rest of the script."
    )


def load_target(target: Target, *, as_main: bool = False) -> object:
    """Load the user code of a target. Of a deployment, that is the class or function.

    Args:
        as_main: This process exists for that code: a script that it comes from becomes the `__main__` of this process.

    Raises:
        ConfigurationError: It cannot be imported or unpickled; the text holds the traceback in the user's code.
    """
    for folder in reversed(target.sys_path):
        if folder not in sys.path and Path(folder).is_dir():
            sys.path.insert(0, folder)
    with importing():
        if target.import_path:
            return unwrap(_find(target.import_path, as_main=as_main))
        try:
            return unwrap(loads(target.pickled, as_main=as_main))
        except Exception as exc:
            raise ConfigurationError(f"Pickled user code cannot be loaded here:\n{user_traceback(exc)}") from exc


def _find(import_path: str, *, as_main: bool) -> object:
    name, _, qualname = import_path.partition(":")
    if not is_script(name):
        return find_attribute(import_module(name), qualname)
    try:
        return find_attribute(run_script(name, as_main=as_main), qualname)
    except ConfigurationError:
        raise
    except Exception as exc:
        raise ConfigurationError(f"Could not run the script {name!r}:\n{user_traceback(exc)}") from exc


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
    except SystemExit as exc:
        raise ConfigurationError(
            f"Could not import module {name!r}: it ended the process (exit code {exc.code}). What it does as a script "
            f"belongs into `if __name__ == {MAIN!r}:`."
        ) from exc


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


def _place(code: object) -> str:
    if "<locals>" in getattr(code, "__qualname__", ""):
        return "a function"
    return f"module {getattr(code, '__module__', '?')!r}"
