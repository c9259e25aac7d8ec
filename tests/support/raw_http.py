"""Bytes to a gateway and back, as they are."""

import asyncio
import contextlib
import re
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.support.slowness import patience


@dataclass(frozen=True)
class Address:
    """Where a gateway listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Address":
        parts = urlsplit(url)
        return cls(parts.hostname or "", parts.port or 80)

    def connect(self, timeout_s: float = 5) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=patience(timeout_s))

    def ask(self, data: bytes, timeout_s: float = 5) -> bytes:
        """Everything that comes back until the gateway closes the connection."""
        with self.connect(timeout_s) as connection:
            return ask(connection, data)

    async def ask_async(self, data: bytes, timeout_s: float, tls: ssl.SSLContext | None = None) -> bytes:
        """The same for many at once."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=tls)
            answer = b""
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                while part := await reader.read(65536):
                    answer += part
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            return answer


def ask(connection: socket.socket, data: bytes) -> bytes:
    """Send, and read to the end."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_response(connection: socket.socket) -> tuple[int, dict[bytes, bytes], bytes]:
    """One response with a Content-Length: status, headers, body; the connection stays open.

    Not a byte more is read: the next response to pipelined requests may have come together with this one.
    """
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        part = connection.recv(1)
        assert part, head
        head += part
    status, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    body, length = b"", int(headers.get(b"content-length", b"0"))
    while len(body) < length:
        part = connection.recv(min(65536, length - len(body)))
        assert part, "the connection was closed within a body"
        body += part
    return int(status.split(b" ")[1]), headers, body


def statuses(answer: bytes) -> list[int]:
    """Of all responses in a stream of them."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n", answer)]
