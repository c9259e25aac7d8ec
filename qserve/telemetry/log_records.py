"""The log of qserve's processes: one format for all of them, as text or as JSON, with the ids of the call.

In replicas every record, also one of user code, has these attributes, which formats of users may name:
`qserve_deployment`, `qserve_replica`, `qserve_request_id`, `qserve_call_id` and `qserve_attempt`. They are empty (0)
where there is nothing to say.
"""

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal

from qserve.context import current_call

Process = Literal["gateway", "node", "worker", "beat", "replica", "command"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OWN_PREFIX = "qserve_"
_UTC = "%Y-%m-%dT%H:%M:%S"


@dataclass
class ProcessFacts:
    """What this process is."""

    process: Process = "command"
    deployment: str = ""
    replica: str = ""


_HERE: Final = ProcessFacts()


def this_process() -> ProcessFacts:
    """What this process is, as its records say."""
    return _HERE


def log_as(process: Process, deployment: str = "", replica: str = "") -> None:
    """Say in each record from now on what process it comes from.

    Args:
        replica: The tag of a replica; then every record also says which call it belongs to.
    """
    _HERE.process, _HERE.deployment, _HERE.replica = process, deployment, replica
    if replica and not isinstance(logging.getLogRecordFactory(), _Tagging):
        logging.setLogRecordFactory(_Tagging(logging.getLogRecordFactory()))


def log_to_stderr(process: Process, level: str, log_format: str) -> None:
    """Configure the logging of a process of ours, unless somebody has."""
    log_as(process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if log_format == "json":
        _log_what_is_printed(handler)


def formatter(log_format: str) -> logging.Formatter:
    """The formatter of every process: `text` or `json`."""
    return JsonLines() if log_format == "json" else _Text()


def _log_what_is_printed(handler: logging.Handler) -> None:
    """Let warnings, and errors that nobody catches, be records like all others."""
    logging.captureWarnings(True)
    logger = logging.getLogger("python")

    def on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, Exception):
            logger.critical("uncaught: %s", kind.__name__, exc_info=(kind, error, trace))
        else:
            sys.__excepthook__(kind, error, trace)

    def on_end_of_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None and told.exc_type is not SystemExit:
            name = told.thread.name if told.thread is not None else "?"
            found = (told.exc_type, told.exc_value, told.exc_traceback)
            logger.error("thread %s ended with %s", name, told.exc_type.__name__, exc_info=found)

    def on_unraisable(told: "sys.UnraisableHookArgs") -> None:
        if told.exc_value is not None:
            found = (told.exc_type, told.exc_value, told.exc_traceback)
            logger.error("%s %r", told.err_msg or "Exception ignored in:", told.object, exc_info=found)

    sys.excepthook, threading.excepthook, sys.unraisablehook = on_uncaught, on_end_of_thread, on_unraisable


def log_warnings(handler: logging.Handler) -> None:
    """Let Python's warnings be records, which this handler writes, however user code configures logging."""
    logging.captureWarnings(True)
    logger = logging.getLogger("py.warnings")
    logger.handlers, logger.propagate = [handler], False


class _Tagging:
    """Makes records that say which replica and which call they belong to."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        call = current_call.get()
        record.qserve_deployment, record.qserve_replica = _HERE.deployment, _HERE.replica
        if call is None:
            record.qserve_request_id = record.qserve_call_id = ""
            record.qserve_attempt = 0
        else:
            record.qserve_request_id = call.request_id
            record.qserve_call_id = call.call_id
            record.qserve_attempt = call.attempt
        return record


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s")  # so that there is an asctime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        place = f"{_HERE.process}[{record.process}] {_about(record)}"
        return f"{record.asctime} {record.levelname:<7} {place}{record.name}: {record.message}"


def _about(record: logging.LogRecord) -> str:
    request, call = getattr(record, "qserve_request_id", ""), getattr(record, "qserve_call_id", "")
    attempt = getattr(record, "qserve_attempt", 0)
    words = [_HERE.replica or _HERE.deployment, request, call if call != request else ""]
    words += [f"attempt {attempt}"] if attempt > 1 else []
    said = " ".join(filter(None, words))
    return f"[{said}] " if said else ""


class JsonLines(logging.Formatter):
    """One JSON object for each record. What user code gives as `extra` is in it, too."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime(_UTC, time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": _HERE.process,
            "pid": record.process,
            "logger": record.name,
            "message": _message_of(record),
            "deployment": _HERE.deployment,
            "replica": _HERE.replica,
            "request_id": getattr(record, "qserve_request_id", ""),
            "call_id": getattr(record, "qserve_call_id", ""),
            "attempt": getattr(record, "qserve_attempt", 0),
            **_trace(),
        }
        line = {name: value for name, value in line.items() if value or name == "message"}
        for name, value in vars(record).items():
            if name not in _STANDARD and not str(name).startswith(_OWN_PREFIX) and value is not None:
                line.setdefault(str(name), value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return _json_of(line)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # the arguments do not fit the text
        return f"{_text_of(record.msg)} {_text_of(record.args) if record.args else ''}".rstrip()


def _json_of(line: dict[str, Any]) -> str:
    """A line of JSON, whatever users have given."""
    dump = partial(json.dumps, default=_text_of, ensure_ascii=False, skipkeys=True, allow_nan=False)
    try:
        return dump(line)
    except (ValueError, RecursionError):  # no number, or a value that contains itself
        return dump({name: value if _is_plain(value) else _text_of(value) for name, value in line.items()})


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int) or value is None or (isinstance(value, float) and math.isfinite(value))


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"


def _trace() -> dict[str, str]:
    """The ids of the span that is current, where the process has anything to do with traces."""
    api = sys.modules.get("opentelemetry.trace")
    context = api.get_current_span().get_span_context() if api is not None else None
    if context is None or not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
