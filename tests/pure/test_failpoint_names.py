"""QSERVE_FAILPOINT: what it may say, and when a process is killed or frozen."""

import asyncio
import os
import signal

import pytest

from qserve.failpoints import Armed


@pytest.mark.parametrize("wanted", ["", "run", "run:0", "run:x", "nowhere:1", "run:1:sleep", "run:1,"])
def test_what_is_no_point_is_refused_with_those_there_are(wanted: str) -> None:
    with pytest.raises(ValueError, match=r"is not NAME:NTH or NAME:NTH:stop with a name of admit, .*Unset it"):
        Armed(wanted)


async def test_the_process_gets_its_signal_at_the_nth_time_and_after_sending_in_the_next_turn(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
    armed = Armed("run:2,reply-sent:1:stop")

    armed.reach("run")
    armed.reach("taken")
    assert sent == []
    armed.reach("run")
    assert sent == [(os.getpid(), signal.SIGKILL)]
    armed.reach("reply-sent")
    assert len(sent) == 1
    await asyncio.sleep(0)

    assert sent[1:] == [(os.getpid(), signal.SIGSTOP)]
    assert f"failpoint run: SIGKILL for pid {os.getpid()}\n" in capfd.readouterr().err
