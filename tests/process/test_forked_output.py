"""What a process prints that user code has forked."""

import io
import os
import sys
import threading

import pytest

from qserve_workers.user.user_output import show_output
from tests.support.waiting import joined


class Below(io.StringIO):
    """A stream whose first writer has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.opened = threading.Event()

    def write(self, text: str, /) -> int:
        if not self.entered.is_set():
            self.entered.set()
            self.opened.wait()
        return super().write(text)


def test_a_child_can_print_whatever_a_thread_of_its_parent_was_about(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    below = Below()
    monkeypatch.setattr(sys, "stdout", below)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show_output("Echo", names_records=False)
    thread = threading.Thread(target=print, args=("parent",), daemon=True)
    thread.start()
    below.entered.wait()
    child = os.fork()
    if not child:
        try:
            sys.stdout.write("child\n")
            os.write(1, below.getvalue().encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    below.opened.set()
    joined(thread)
    assert capfd.readouterr().out == "Echo | child\n"
    assert below.getvalue() == "Echo | parent\n"
