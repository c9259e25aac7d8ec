"""What user code prints while it prints: from `__del__`, from signal handlers, from and from other threads."""

import io
import threading
from collections.abc import Callable
from typing import Any

import pytest

from qserve_workers.user.user_output import NamedOutput
from tests.support.waiting import joined, wait_until


class Below(io.StringIO):
    """A stream that does something when it is first written to, as the collector and signals do at any point."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] | None = meanwhile
        self.reconfigured: dict[str, Any] = {}

    def write(self, text: str, /) -> int:
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().write(text)

    def reconfigure(self, **options: Any) -> None:
        self.reconfigured = options


def on_a_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_what_is_printed_within_a_print_of_the_same_thread_comes_after_it() -> None:
    below = Below(lambda: print("bye", file=output))
    output = NamedOutput(below, "Echo")
    joined(on_a_thread(lambda: output.write("one\ntwo\n")))
    assert below.getvalue() == "Echo | one\nEcho | two\nEcho | bye\n"


def test_a_thread_that_cannot_write_now_goes_on_and_what_it_printed_comes_later() -> None:
    opened = threading.Event()
    below = Below(opened.wait)
    output = NamedOutput(below, "Echo")
    first = on_a_thread(lambda: print("first", file=output))
    wait_until(lambda: below.meanwhile is None)
    joined(on_a_thread(lambda: print("second", file=output)))
    opened.set()
    joined(first)
    assert below.getvalue() == "Echo | first\nEcho | second\n"


def test_the_output_has_what_the_stream_below_has() -> None:
    below = Below()
    output: Any = NamedOutput(below, "Echo")
    output.reconfigure(line_buffering=True)
    assert below.reconfigured == {"line_buffering": True}
    with pytest.raises(AttributeError):
        _ = output.no_such_thing
    with pytest.raises(TypeError, match="must be str, not bytes"):
        output.write(b"bytes")


def test_the_stream_of_bytes_can_be_taken_out() -> None:
    of_bytes = io.BytesIO()
    output: Any = NamedOutput(io.TextIOWrapper(of_bytes, encoding="ascii"), "Echo")
    taken_out = io.TextIOWrapper(output.detach(), encoding="utf-8", write_through=True)
    print("é", file=taken_out)
    assert of_bytes.getvalue().decode() == "é\n"


def test_of_a_line_that_is_written_over_only_the_last_version_is_kept() -> None:
    output = NamedOutput(below := io.StringIO(), "Echo")
    for percent in range(3):
        print(f"\r{percent} %", end="", file=output)
    assert "".join(output._begun) == "2 %"
    for percent in range(3, 6):
        print(f"{percent} %", end="\r", file=output)
    assert "".join(output._begun) == "5 %\r"
    print("all of it\r", file=output)
    print("next", file=output)
    assert below.getvalue() == "Echo | all of it\nEcho | next\n"


def test_a_line_that_comes_in_many_parts_is_put_together_once() -> None:
    output = NamedOutput(below := io.StringIO(), "Echo")
    for _ in range(3):
        print(".", end="", file=output)
    assert list(output._begun) == [".", ".", "."]
    print(file=output)
    assert below.getvalue() == "Echo | ...\n"
