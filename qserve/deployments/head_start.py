"""A head start: the process of an instance imports what it needs while the command that wants it reads the user's code.

Both take about as long, and neither needs what the other has found, so a machine with two cores does them in half the
time. The process is told what to be as soon as that is known, and ends quietly if it never is.

This module imports nothing of qserve, so that a command can begin with it.
"""

import contextlib
import io
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

PROGRAM = (sys.executable, "-m", "qserve_workers.instance_process")
"""What is run: the process that holds an instance together."""
WAITS = "--wait-for-orders"
"""On its command line: what to be comes on its standard input."""
_ABOUT = "which the command gives that reads the code of the user meanwhile"
"""Follows on its command line. The titles of what is forked from it take its place, which is why it is that long."""
FOR_SOME = ("fastapi", "cryptography.hazmat.primitives.ciphers.aead")
"""What many deployments need besides: a fifth of the time that all imports take, and so imported where it is wanted, or
when nothing else is to be done."""
_IDLE_S = 0.1
_ONLY_AT_START = ("PYTHON", "LD_", "GLIBC_", "MALLOC_")
"""What variables begin with that only a process that has just been started heeds."""
_END_S = 5.0


class HeadStart:
    """A process that imports and waits. Not thread-safe."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack, theirs:
            self._orders = stack.enter_context(ours)
            self._process = subprocess.Popen(
                [*PROGRAM, WAITS, _ABOUT],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches the command alone, which stops the rest in order
            )
            self._heeded = _heeded_at_start(os.environ)
            stack.pop_all()

    def begin(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: int
    ) -> "subprocess.Popen[bytes] | None":
        """Let it be what was wanted.

        Args:
            arguments: Its command line.
            environment: All of its environment.
            output: Descriptor that it writes to, errors too.

        Returns:
            The process, whose owner is the caller from now on; None if it has ended, or was started with variables
            that are other ones now and would come too late.
        """
        if _heeded_at_start(environment) != self._heeded:
            self.cancel()
            return None
        order = json.dumps([list(arguments), dict(environment)]).encode()
        try:
            with self._orders as orders:
                socket.send_fds(orders, [order[:1]], [output])
                orders.sendall(order[1:])
        except OSError:
            self.cancel()
            return None
        return self._process

    def cancel(self) -> None:
        """Let it end, because nobody wants it; without effect once it has begun."""
        if self._orders.fileno() == -1:
            return
        self._orders.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)


def _heeded_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_ONLY_AT_START)}


def wait_for_orders(meanwhile: Callable[[], object]) -> bool:
    """Wait to be told what to be, in the process that was started ahead; False if nobody wants it any more.

    Then its command line, environment and output are those that were asked for.

    Args:
        meanwhile: Called if that takes a while.
    """
    with socket.socket(fileno=os.dup(0)) as orders:
        if not select.select([orders], [], [], _IDLE_S)[0]:
            meanwhile()
        received, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
        if not received:
            return False
        with orders.makefile("rb") as rest:
            arguments, environment = json.loads(received + rest.read())
    (output,) = descriptors
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, place)
    os.close(nothing)
    os.close(output)
    _open_output_again()
    sys.argv[1:] = arguments
    os.environ.clear()
    os.environ.update(environment)
    return True


def _open_output_again() -> None:
    """What Python has found out about its output, such as whether one can seek in it, was found out before."""
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        raw = io.FileIO(before.fileno(), "w", closefd=False)
        raw.name = before.name
        made = io.TextIOWrapper(
            raw if isinstance(before.buffer, io.RawIOBase) else io.BufferedWriter(raw),  # PYTHONUNBUFFERED
            before.encoding,
            before.errors,
            newline="\n",
            line_buffering=before.line_buffering,
            write_through=before.write_through,
        )
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)
