"""Answers, read from the connection byte by byte, and what of them has to be the same on both sides."""

import re
import socket
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from io import BufferedReader
from typing import Any

from tests.instance.differential.case import Case
from tests.support.slowness import patience

_LIMIT_S = 20.0

NOT_COMPARED = {
    "date": "the server's clock",
    "server": "whose name it is: both say uvicorn today, which nobody should rely on",
    "x-request-id": "the gateway's own, on every answer",
    "connection": "belongs to one connection, not to the answer",
    "keep-alive": "belongs to one connection, not to the answer",
    "transfer-encoding": "how the body travels; the body is compared, part by part where both are chunked",
}
"""Response headers that may differ, and why. A content-length may be added where plain uvicorn sends chunks."""


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        parts: The body in the chunks it came in; one part, or none, where it was not chunked.
    """

    status: int
    reason: str
    headers: list[tuple[str, str]]
    parts: list[bytes]

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.parts)

    def comparable(self, other: "Answer", mask: str) -> dict[str, Any]:
        """What has to be equal to the same of `other`; headers of one name stay in order."""
        headers = defaultdict(list)
        for name, value in self.headers:
            if name == "allow":  # out of a set, whose order is another in each process
                value = ", ".join(sorted(value.split(", ")))  # noqa: PLW2901
            if name not in NOT_COMPARED:
                headers[name].append(re.sub(mask, "*", value) if mask else value)
        if not (self.tells("content-length") and other.tells("content-length")) and (
            self.tells("transfer-encoding") or other.tells("transfer-encoding")
        ):
            headers.pop("content-length", None)
        streamed = self.tells("transfer-encoding") and other.tells("transfer-encoding")
        parts = self.parts if streamed else [self.body]
        body = [re.sub(mask.encode(), b"*", part) if mask else part for part in parts]
        return {"status": self.status, "reason": self.reason, "headers": dict(headers), "body": body}

    def tells(self, name: str) -> bool:
        """Whether it has a header of that name."""
        return any(each == name for each, _ in self.headers)

    def set_cookies(self) -> dict[str, str]:
        """The cookies it sets; those that it takes away are empty."""
        found = (SimpleCookie(value) for name, value in self.headers if name == "set-cookie")
        return {name: morsel.value for cookie in found for name, morsel in cookie.items()}


def ask(address: tuple[str, int], case: Case, prefix: str, cookies: Mapping[str, str]) -> Answer:
    """Send a case's request on a connection of its own and read the answer.

    Raises:
        AssertionError: The answer is not one HTTP message with nothing behind it.
    """
    with socket.create_connection(address, timeout=patience(_LIMIT_S)) as connection:
        connection.sendall(case.encode(prefix, cookies))
        with connection.makefile("rb") as reader:
            answer = _read(reader, case.method)
            connection.shutdown(socket.SHUT_WR)
            surplus = reader.read()
            assert surplus == b"", f"{surplus[:200]!r} follows the answer"
            return answer


def _read(reader: BufferedReader, method: str) -> Answer:
    version, status, *reason = reader.readline().decode("latin-1").rstrip("\r\n").split(" ", 2)
    assert version == "HTTP/1.1", f"{version!r} begins the answer"
    headers = []
    while line := reader.readline().decode("latin-1").rstrip("\r\n"):
        name, _, value = line.partition(":")
        headers.append((name.lower(), value.strip()))
    answer = Answer(int(status), "".join(reason), headers, [])
    if method != "HEAD" and answer.status not in {204, 304}:
        answer.parts.extend(_read_body(reader, dict(headers)))
    return answer


def _read_body(reader: BufferedReader, headers: dict[str, str]) -> list[bytes]:
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(reader.readline(), 16):
            parts.append(_exactly(reader, size))
            assert reader.readline() == b"\r\n"
        assert reader.readline() == b"\r\n"
        return parts
    if "content-length" in headers:
        size = int(headers["content-length"])
        return [_exactly(reader, size)] if size else []
    return [reader.read()]  # until the connection is closed


def _exactly(reader: BufferedReader, size: int) -> bytes:
    data = reader.read(size)
    assert len(data) == size, f"the body ends after {len(data)} of {size} bytes"
    return data
