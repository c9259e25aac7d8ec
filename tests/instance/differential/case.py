"""One request of the differential tests, exactly as it is written to the connection."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

_BOUNDARY = "differential-boundary"

Headers = Mapping[str, str] | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Body:
    """A request's body; no content type, no header. In several parts, it is sent chunked."""

    data: bytes | tuple[bytes, ...] = b""
    content_type: str | None = None


@dataclass(frozen=True)
class File:
    """A file of a multipart form."""

    name: str
    data: bytes
    content_type: str | None = "text/plain"


@dataclass(frozen=True)
class Case:
    """A request, and what to know for comparing its answers.

    Attributes:
        name: Unique among the app's cases.
        target: Request target under the app's prefix, sent as it is.
        body: None: neither a body nor a header about one.
        cookies: Sends back the cookies that this side has set in the app's earlier cases.
        mask: Regular expression for what is random in headers and body.
        version: "1.1" or "1.0".
        host: None: no Host header.
    """

    name: str
    method: str
    target: str
    headers: Headers = ()
    body: Body | None = None
    cookies: bool = False
    mask: str = ""
    version: str = "1.1"
    host: str | None = "apps.example:8080"

    def encode(self, prefix: str, cookies: Mapping[str, str]) -> bytes:
        """The bytes of the request to an app under `prefix`."""
        pairs = list(self.headers.items()) if isinstance(self.headers, Mapping) else list(self.headers)
        if self.host is not None:
            pairs.insert(0, ("Host", self.host))
        if self.cookies and cookies:
            pairs.append(("Cookie", "; ".join(f"{name}={value}" for name, value in cookies.items())))
        data = b""
        if self.body is not None:
            if self.body.content_type is not None:
                pairs.append(("Content-Type", self.body.content_type))
            if isinstance(self.body.data, tuple):
                pairs.append(("Transfer-Encoding", "chunked"))
                data = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*self.body.data, b""))
            else:
                pairs.append(("Content-Length", str(len(self.body.data))))
                data = self.body.data
        head = "".join(f"{name}: {value}\r\n" for name, value in pairs)
        return f"{self.method} {prefix}{self.target} HTTP/{self.version}\r\n{head}\r\n".encode() + data


def as_json(value: Any) -> Body:
    """A JSON body."""
    return Body(json.dumps(value).encode(), "application/json")


def as_form(**fields: str) -> Body:
    """An URL-encoded form."""
    return Body(urlencode(fields).encode(), "application/x-www-form-urlencoded")


def as_multipart(*parts: tuple[str, str | File]) -> Body:
    """A multipart form of fields and files, in this order."""
    lines = []
    for name, value in parts:
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
        if isinstance(value, File):
            kind = f"\r\nContent-Type: {value.content_type}" if value.content_type else ""
            lines.append(f'{head}; filename="{value.name}"{kind}\r\n\r\n'.encode() + value.data + b"\r\n")
        else:
            lines.append(f"{head}\r\n\r\n{value}\r\n".encode())
    closing = f"--{_BOUNDARY}--\r\n".encode()
    return Body(b"".join(lines) + closing, f"multipart/form-data; boundary={_BOUNDARY}")
