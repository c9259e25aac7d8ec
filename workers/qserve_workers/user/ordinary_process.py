"""Makes a child of the pool an ordinary Python process again, before any code of the user's is imported in it.

Celery and billiard set a process up for tasks: it may have no children, ignores SIGINT, waits for no results, logs
through handlers that nobody may replace, and ends without running what was registered with `atexit`. User code expects
what Python promises instead.
"""

import atexit
import contextlib
import functools
import logging
import multiprocessing.process
import multiprocessing.util
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import billiard.process
from celery import _state as celery_state

from qserve.telemetry.log_records import JsonLines, log_warnings
from qserve_workers.user.user_threads import note_fork

logger = logging.getLogger(__name__)

_EXIT = sys.exit
_CONFIGURE = logging.basicConfig
_MAIN_PROCESS = multiprocessing.process.current_process()
"""As it is in the worker, which imports this module: what every interpreter begins as."""
_OWN_LOGGERS = ("qserve", "qserve_workers")
_CELERY_LOGGERS = ("celery", "celery.task", "celery.redirected", "multiprocessing")
_CELERY_VARIABLES = ("CELERY_LOG_", "_MP_FORK_LOG")


def become_ordinary(own_signals: Iterable[int]) -> None:
    """Take back what Celery and billiard have set up in this process. On its main thread.

    Args:
        own_signals: Those that the replica handles and no process that user code forks shall.
    """
    sys.exit = _EXIT  # billiard has put another function there
    # A group of its own, so that what user code leaves running can be ended with the replica.
    os.setpgid(0, 0)
    # Ignored, as Celery has it, every program that user code starts would ignore it, too. A handler is not inherited.
    signal.signal(signal.SIGINT, _stay)
    for name in [name for name in os.environ if name.startswith(_CELERY_VARIABLES)]:
        del os.environ[name]
    _allow_children()
    _leave_celery()
    _leave_logging_to_user_code()
    _forget_exit_hooks()
    if "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _refuse_breakpoint
    forks = _Forks(frozenset(own_signals))
    os.register_at_fork(before=forks.before, after_in_parent=forks.after_in_parent, after_in_child=forks.after_in_child)


def _refuse_breakpoint(*_args: object, **_kwargs: object) -> None:
    """A debugger would find no terminal here, and end the call with an error that does not say so."""
    raise RuntimeError(
        "breakpoint() finds no terminal in a replica. Run the application in your own process, with "
        "`qserve.testing.local(app)` or `serve.run(app, _local_testing_mode=True)`, or name a remote debugger in "
        "PYTHONBREAKPOINT."
    )


def _stay(_signum: int, _frame: object) -> None:
    """Ctrl-C in a terminal is for the worker, which ends its replicas in order."""


class _Forks(threading.local):
    """What a process that user code forks does with its signals: they are its own, and wake nobody up in the replica.

    They are blocked meanwhile: one that came before the new process has its own handlers would be lost.
    """

    def __init__(self, own: frozenset[int]) -> None:
        self._own = own
        self._mask: set[int] = set()

    def before(self) -> None:
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, self._own | {signal.SIGINT}))

    def after_in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def after_in_child(self) -> None:
        note_fork()
        with contextlib.suppress(ValueError):  # not on the main thread: an interpreter of its own
            signal.set_wakeup_fd(-1)
            for signum in self._own:
                signal.signal(signum, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def _allow_children() -> None:
    main: Any = multiprocessing.process
    main._current_process = type(_MAIN_PROCESS)()
    main._parent_process = None
    main._children = set()
    process: Any = billiard.process
    process._current_process._config["daemon"] = False


def _leave_celery() -> None:
    state: Any = celery_state
    state._set_task_join_will_block(False)
    state.set_default_app(None)
    state._tls.current_app = None


def adopt_celery_app() -> None:
    """Make the Celery app that user code has made on this thread the one of all threads.

    Celery knows it on that thread only, and replicas run user code on several. Shared tasks ask for it.
    """
    state: Any = celery_state
    if state._tls.current_app is not None and getattr(state.default_app, "main", "default") == "default":
        state.set_default_app(state._tls.current_app)


class _OwnLogger(logging.Logger):
    """A logger that `logging.config.dictConfig` does not switch off, as it does by default with all that exist."""

    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        """Stay as it is."""


class _Unasked(int):
    """A level that user code has not set: it may set the same number, and then means it."""


def _leave_logging_to_user_code() -> None:
    """Nothing is configured, as in a new interpreter; qserve's own records go where they went before."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    for name in _CELERY_LOGGERS:
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    for name in _OWN_LOGGERS:
        own = logging.getLogger(name)
        own.handlers, own.propagate = list(handlers), False
        own.setLevel(level)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] in _OWN_LOGGERS and type(logger) is logging.Logger:
            vars(logger).pop("disabled", None)
            logger.__class__ = _OwnLogger
    root.handlers = []
    root.setLevel(_Unasked(level))
    if handlers and handlers[0].formatter is not None:
        # Where user code configures nothing, its records look like all others. Python's default would drop INFO.
        default = logging.StreamHandler()
        default.setFormatter(handlers[0].formatter)
        logging.lastResort = default
        logging.basicConfig = _configure
        if isinstance(default.formatter, JsonLines):
            log_warnings(default)
        else:
            logging.captureWarnings(False)
    _reset_warnings()


@functools.wraps(_CONFIGURE)
def _configure(**given: Any) -> None:
    """Configure logging as user code asks for.

    `logging.warning` and its like ask for it, too, where nothing is configured. From then on no record would look like
    those before.
    """
    if given or sys._getframe(1).f_globals is not vars(logging):
        _CONFIGURE(**given)


def _reset_warnings() -> None:
    """Warnings are shown as in a new interpreter, which leaves out those that are for developers of libraries."""
    warnings.resetwarnings()
    for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    for option in sys.warnoptions:
        warnings._processoptions([option])  # type: ignore[attr-defined]


def settle_log_level() -> None:
    """Once user code is imported and constructed: where it has configured logging without a level, Python's holds."""
    root = logging.getLogger()
    if root.handlers and isinstance(root.level, _Unasked):
        root.setLevel(logging.WARNING)


def _forget_exit_hooks() -> None:
    """The worker's are the worker's; those of the standard library have a meaning here, too."""
    atexit._clear()
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # the next one registers again
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def run_exit_hooks(timeout_s: float, exit_code: int) -> None:
    """Wait for the threads of user code and run what was registered with `atexit`, as Python does at its end.

    Args:
        timeout_s: The longest that it may take. Then the process ends; of this time, threads get half.
        exit_code: What the process then ends with.
    """
    watchdog = threading.Timer(timeout_s, _give_up, (timeout_s, exit_code))
    watchdog.daemon = True
    watchdog.start()
    # Not on this thread: a thread that never ends would keep the hooks from running at all.
    threads = threading.Thread(target=threading._shutdown, daemon=True)  # type: ignore[attr-defined]
    threads.start()
    threads.join(timeout_s / 2)
    atexit._run_exitfuncs()
    watchdog.cancel()


def _give_up(timeout_s: float, exit_code: int) -> None:
    logger.warning("what user code has registered with atexit did not end within %.1f s and is left alone", timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def end_group(pid: int) -> None:
    """End what a replica that has ended has left running in its group: a process that starts a session lives on."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
