"""What a caller gets to catch when something was raised in a replica."""

import asyncio
import copy
import pickle
import sys
import threading
from collections import deque
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from qserve import errors
from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    QServeError,
    ReplicaDied,
    ResultTooLarge,
    TaskError,
    failure_of,
)
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


class UpstreamError(Exception):
    """Has fields that are called like qserve's own."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code
        self.message, self.cause, self.module = "quota", "billing", "accounts"


class PageError(LookupError):
    code = 404
    status = 410

    @property
    def message(self) -> str:
        return f"page {self.args[0]}"


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


def test_fields_that_are_called_like_qserves_own_have_the_users_values() -> None:
    error = travel_error(UpstreamError(404, "no_user"))
    assert (error.status, error.code, error.args) == (404, "no_user", (404, "no_user"))
    assert (error.message, error.cause, error.module) == ("quota", "billing", "accounts")
    failure = failure_of(error)
    assert (failure.type_name, failure.module, failure.message) == ("UpstreamError", __name__, "(404, 'no_user')")
    assert vars(failure.cause) == vars(UpstreamError(404, "no_user"))
    assert "Traceback" in str(error)


def test_attributes_of_the_class_and_properties_are_the_users() -> None:
    error = travel_error(PageError(7))
    assert (error.code, error.status, error.message) == (404, 410, "page 7")
    assert failure_of(error).message == "7"
    again = travel_error(error)  # from a replica that called another one
    assert (again.code, again.message, failure_of(again).type_name) == (404, "page 7", "PageError")


def test_an_attribute_that_cannot_travel_costs_only_itself() -> None:
    error = ValueError("bad", threading.Lock(), 3)
    error.good, error.lock = [1], threading.Lock()  # type: ignore[attr-defined]
    got = travel_error(error)
    assert (got.args[0], got.args[2], got.good, hasattr(got, "lock")) == ("bad", 3, [1], False)
    assert got.args[1].startswith("<unlocked _thread.lock object at")


def test_slots_arrive() -> None:
    error = SlotsError(1, "x")
    error.extra = 5  # type: ignore[attr-defined]
    assert travel_error(error).extra == 5


def test_notes_and_the_cause_arrive() -> None:
    error = ValueError("v")
    error.add_note("while reading")
    error.__cause__ = UpstreamError(503, "down")
    error.__cause__.__cause__ = KeyError("k")
    got = travel_error(error)
    assert got.__notes__ == ["while reading"]
    assert (type(got.__cause__), got.__cause__.status) == (UpstreamError, 503)
    assert repr(got.__cause__.__cause__) == "KeyError('k')"
    original: Any = failure_of(got).cause
    assert original.__cause__ is got.__cause__


def test_a_chain_of_causes_without_end_is_cut() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    causes, got = 0, travel_error(first)
    while got is not None:
        causes, got = causes + 1, got.__cause__
    assert causes == 9


def test_a_group_arrives_with_its_members() -> None:
    got = travel_error(ExceptionGroup("g", [PageError(7), ExceptionGroup("inner", [KeyError("k")]), BadStrError("b")]))
    assert isinstance(got, TaskError)
    with pytest.raises(ExceptionGroup) as raised_group:
        raise got
    page, inner, _ = raised_group.value.exceptions
    assert (type(page), page.args) == (PageError, (7,))
    assert repr(inner) == "ExceptionGroup('inner', [KeyError('k')])"
    assert raised_group.value.subgroup(KeyError) is not None


def test_a_member_whose_class_is_not_known_is_a_task_error(monkeypatch: pytest.MonkeyPatch) -> None:
    info = codec.pack_error(raised(ExceptionGroup("g", [OddInitError(5, why="x"), KeyError("k")])))
    monkeypatch.delattr(sys.modules[__name__], "OddInitError")
    got: Any = codec.rebuild_error(info)
    assert [type(each) for each in got.exceptions] == [TaskError, KeyError]


def test_a_validation_error_of_pydantic_is_the_cause_of_a_task_error() -> None:
    """No class can derive from pydantic's, so the error that is raised cannot be one."""

    class Model(BaseModel):
        age: int
        blob: Any

    error = ValidationError.from_exception_data(
        "Model",
        [
            {"type": "int_parsing", "loc": ("age",), "input": "old"},
            {"type": PydanticCustomError("odd", "odd {x}", {"x": 1}), "loc": ("blob", 0), "input": threading.Lock()},
        ],
    )
    got = travel_error(error)
    assert type(got) is TaskError
    assert isinstance(got.cause, ValidationError)
    first, second = got.cause.errors()
    assert (first["type"], first["loc"], first["input"]) == ("int_parsing", ("age",), "old")
    assert (second["type"], second["loc"], second["msg"]) == ("odd", ("blob", 0), "odd 1")
    assert str(error).splitlines()[0] in str(got.cause)


@pytest.mark.parametrize(
    "kind", [MemoryError, RecursionError, BlockingIOError, ConnectionResetError, ModuleNotFoundError]
)
def test_builtin_errors_come_as_themselves(kind: type[Exception]) -> None:
    assert isinstance(travel_error(kind("m")), kind)


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
    got: Any = signed.rebuild_error(info)
    assert got.args == got.cause.args == ("deque([1])",)
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


OWN = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, QServeError)]


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

    machinery: dict[str, Any] = {"__name__": "qserve_workers.replica.replica_process"}
    exec("def run(call):\n    try:\n        call()\n    except Exception as exc:\n        return exc", machinery)
    text = codec.pack_error(machinery["run"](user_code)).traceback_text
    assert "in user_code" in text
    assert "in run" not in text
