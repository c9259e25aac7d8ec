"""What a caller gets to catch when something was raised in a replica."""

import asyncio
import copy
import pickle
import sys
import threading
from collections import deque
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from qserve import errors
from qserve.errors import BackPressureError, BrokerUnavailable, QServeError, ReplicaDied, ResultTooLarge, TaskError
from qserve.wire.codec import Codec
from qserve.wire.messages import ErrorInfo, decode_error, encode

codec = Codec(allow_pickle=False, max_bytes=1024 * 1024)


class OddInitError(Exception):
    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(f"code {code}")
        self.code_number = code
        self.why = why


class OddNewError(Exception):
    def __new__(cls, a: int, b: int) -> "OddNewError":
        return super().__new__(cls, a)

    def __init__(self, a: int, b: int) -> None:
        self.b = b


class BadStrError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")

    __repr__ = __str__


class Meta(type):
    def __call__(cls, *args: Any) -> Any:
        raise AssertionError("no user code runs")


class MetaError(Exception, metaclass=Meta):
    pass


class FinalError(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class SlotsError(OSError):
    __slots__ = ("extra",)


class OwnError(QServeError):
    """A user's own subclass."""


def deep_list(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as exc:
        return exc


def travel_error(error: BaseException, by: Codec = codec) -> Any:
    return by.rebuild_error(decode_error(encode(by.pack_error(raised(error)))))


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        KeyError("k"),
        OSError(2, "No such file", "name.txt"),
        FileNotFoundError(2, "No such file", "name.txt"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ImportError("no", name="mod", path="p"),
        TimeoutError("late"),
        HTTPException(status_code=418, detail="tea", headers={"a": "b"}),
        OddInitError(5, why="x"),
        OwnError("o"),
        Exception((1, 2), {3}),
        SlotsError(1, "x"),
        ValueError(),
    ],
    ids=repr,
)
def test_a_user_exception_is_a_task_error_and_its_own_class(error: Exception) -> None:
    got = travel_error(error)
    assert isinstance(got, TaskError)
    assert isinstance(got, type(error))
    assert "Traceback (most recent call last)" in str(got)
    assert type(error).__name__ in str(got)
    assert (got.type_name, got.module, got.message) == (type(error).__qualname__, type(error).__module__, str(error))
    assert type(got.cause) is type(error)
    assert got.cause.args == error.args
    assert str(got.cause) == str(error)
    assert vars(got.cause) == vars(error)


def test_attributes_of_the_original_can_be_read_where_it_is_caught() -> None:
    assert travel_error(OSError(2, "No such file", "name.txt")).filename == "name.txt"
    assert travel_error(HTTPException(418, "tea")).status_code == 418
    assert travel_error(ImportError("no", name="mod")).name == "mod"
    assert travel_error(OddInitError(5, why="x")).why == "x"
    with pytest.raises(ZeroDivisionError):
        raise travel_error(ZeroDivisionError())


@pytest.mark.parametrize("error", [OddNewError(1, 2), MetaError.__new__(MetaError)], ids=["new", "metaclass"])
def test_no_code_of_the_class_runs_when_it_is_rebuilt(error: Exception) -> None:
    got = travel_error(error)
    assert isinstance(got, TaskError)
    assert isinstance(got, type(error))


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        StopIteration(1),
        StopAsyncIteration(),
        FinalError("f"),
        ExceptionGroup("g", [ValueError("v")]),
        BaseExceptionGroup("g", [SystemExit()]),
    ],
    ids=repr,
)
def test_what_no_caller_should_catch_by_its_class_is_a_plain_task_error(error: BaseException) -> None:
    got = travel_error(error)
    assert type(got) is TaskError
    assert got.type_name == type(error).__qualname__
    assert type(error).__name__ in str(got)


def test_an_exception_the_caller_has_not_imported_is_a_plain_task_error(monkeypatch: pytest.MonkeyPatch) -> None:
    info = codec.pack_error(raised(OddInitError(5, why="x")))
    monkeypatch.delattr(sys.modules[__name__], "OddInitError")
    got: Any = codec.rebuild_error(info)
    assert type(got) is TaskError
    assert (got.type_name, got.message, got.cause) == ("OddInitError", "code 5", None)


@pytest.mark.parametrize(
    ("module", "type_name"),
    [
        ("os", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "SystemExit"),
        ("builtins", "ValueError.__class__"),
        ("builtins", "__import__"),
        ("antigravity", "Error"),
        ("", ""),
        (__name__, "codec"),
    ],
)
def test_a_name_that_is_no_imported_exception_makes_a_plain_task_error(module: str, type_name: str) -> None:
    got = codec.rebuild_error(ErrorInfo("", type_name, module, "text", "trace", encode(["x"])))
    assert type(got) is TaskError
    assert str(got) == "trace"
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("args", [b"\xc1", b"\x93", encode([1, 2]), encode({}), b"\x91" * 5000, b"x" * 200_000])
def test_rubbish_for_arguments_does_not_hide_the_error(args: bytes) -> None:
    got = codec.rebuild_error(ErrorInfo("", "KeyError", "builtins", "'k'", "trace", args))
    assert isinstance(got, KeyError)
    assert isinstance(got, TaskError)
    assert codec.rebuild_error(ErrorInfo("ReplicaDied", "", "", "dead", "", args)).args == ("dead",)


@pytest.mark.parametrize(
    "error",
    [
        BadStrError("x"),
        ValueError(threading.Lock()),
        ValueError("\ud800"),
        ValueError("x" * 1_000_000),
        ValueError(deep_list(5000)),
        type("Nameless", (Exception,), {"__module__": "\udcff"})(),
        type("Liar", (Exception,), {"__traceback__": property(lambda self: 1 / 0)})(),
    ],
    ids=["str", "args", "surrogate", "large", "deep", "name", "traceback"],
)
def test_packing_an_error_never_raises(error: Exception) -> None:
    info = codec.pack_error(raised(error))
    assert len(encode(info)) < 300_000
    assert isinstance(codec.rebuild_error(decode_error(encode(info))), TaskError)


def test_arguments_of_errors_are_never_pickled() -> None:
    signed = Codec(allow_pickle=True, max_bytes=1024)
    info = signed.pack_error(raised(ValueError(deque([1]))))
    assert info.args == b""
    got: Any = signed.rebuild_error(info)
    assert got.cause is None
    assert isinstance(got, ValueError)


def test_one_attribute_that_cannot_travel_leaves_the_others() -> None:
    error = ValueError("v")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    error.number = 5  # type: ignore[attr-defined]
    got = travel_error(error)
    assert got.number == 5
    assert not hasattr(got, "lock")


def test_qserve_errors_arrive_as_themselves_with_their_facts() -> None:
    got = travel_error(BackPressureError("full", retry_after=2.5))
    assert type(got) is BackPressureError
    assert (str(got), got.retry_after, got.status) == ("full", 2.5, 503)
    assert type(travel_error(ReplicaDied("dead"))) is ReplicaDied
    assert isinstance(travel_error(BrokerUnavailable("gone")), ConnectionError)
    large = travel_error(ResultTooLarge("big", type_name="bytes"))
    assert type(large) is ResultTooLarge
    assert (large.message, large.type_name) == ("big", "bytes")


OWN = [cls for cls in vars(errors).values() if isinstance(cls, type) and cls.__module__ == "qserve.errors"]


@pytest.mark.parametrize("cls", OWN)
def test_every_error_of_qserve_survives_the_wire(cls: type[QServeError]) -> None:
    got = travel_error(cls("text"))
    assert type(got) is cls
    assert "text" in str(got)


def test_an_error_that_passes_through_several_replicas_keeps_class_and_traceback() -> None:
    got = travel_error(travel_error(travel_error(OSError(2, "No such file", "name.txt"))))
    assert (got.type_name, got.filename) == ("FileNotFoundError", "name.txt")
    assert got.message == "[Errno 2] No such file: 'name.txt'"
    assert str(got).count("Traceback (most recent call last)") == 3
    assert isinstance(got, FileNotFoundError)
    assert type(travel_error(travel_error(SystemExit(1)))) is TaskError


def test_a_rebuilt_error_can_be_pickled_and_copied() -> None:
    got = travel_error(FileNotFoundError(2, "No such file"))
    for twin in (pickle.loads(pickle.dumps(got)), copy.copy(got), copy.deepcopy(got)):
        assert isinstance(twin, TaskError)
        assert str(twin) == str(got)
        assert twin.type_name == "FileNotFoundError"


def test_the_traceback_starts_where_user_code_starts() -> None:
    def user_code() -> None:
        raise ValueError("here")

    machinery: dict[str, Any] = {"__name__": "qserve_workers.replica.lifecycle"}
    exec("def run(call):\n    try:\n        call()\n    except Exception as exc:\n        return exc", machinery)
    text = codec.pack_error(machinery["run"](user_code)).traceback_text
    assert "in user_code" in text
    assert "in run" not in text
