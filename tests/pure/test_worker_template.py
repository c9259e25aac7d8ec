"""What a node is told when its template cannot fork."""

import errno
import os
import socket
from pathlib import Path

import msgspec
import pytest

from qserve_workers.node_template import Forked, ForkOrder
from qserve_workers.template import wait_for_birth


def test_a_template_that_cannot_fork_says_why_and_takes_the_next_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, "too many processes")

    monkeypatch.setattr(os, "fork", refuse)
    node, template = socket.socketpair()
    with node, template:
        order = msgspec.json.encode(ForkOrder("gateway", ["--port", "0"], 15, os.getpid()))
        before = open_files()
        for _ in range(2):
            socket.send_fds(node, [order + b"\n"], [node.fileno()])
        node.shutdown(socket.SHUT_WR)

        assert wait_for_birth(template) is None

        assert open_files() == before
        answers = [msgspec.json.decode(line, type=Forked) for line in node.recv(10_000).splitlines()]
    assert [(answer.pid, "too many processes" in answer.error) for answer in answers] == [(0, True)] * 2


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
