"""Runs as a process that has lent a value: it prints what others open it by, and lives until it is killed.

Usage: python -m tests.support.lender CONTENT_IN_HEX
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qserve.this_machine import this_host
from qserve.values.segments import Segment, place_of
from qserve.wire.messages import Lent, decode_lent, encode
from tests.support.serving import ROOT


@contextmanager
def lent_by_another_process(content: bytes) -> Iterator[Lent]:
    """A value that a process has lent, which is killed in the end."""
    command = [sys.executable, "-m", "tests.support.lender", content.hex()]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout is not None
            yield decode_lent(bytes.fromhex(owner.stdout.readline().decode()))
        finally:
            owner.kill()


def main() -> None:
    content = bytes.fromhex(sys.argv[1])
    segment = Segment(1 << 20)
    segment.begin()
    (at,), _ = place_of([len(content)])
    segment.write(at, content)
    lent = segment.lent("another process", this_host(), [len(content)])
    sys.stdout.buffer.write(encode(lent).hex().encode() + b"\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
