"""Headers that the gateway does not pass on, in either direction."""

import re

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

SPOOFED = frozenset(
    {
        b"x_forwarded_for",
        b"x_forwarded_host",
        b"x_forwarded_port",
        b"x_forwarded_prefix",
        b"x_forwarded_proto",
        b"x_real_ip",
    }
)
"""Spellings that applications in the style of WSGI cannot tell from the headers that a trusted proxy sets."""

UNUSUAL = HOP_BY_HOP | SPOOFED
"""The headers of a request that are taken out; one without them is passed on as it is."""

PROTECTED = frozenset(
    {
        b"authorization",
        b"content-length",
        b"cookie",
        b"forwarded",
        b"host",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-real-ip",
    }
)
"""Headers that `Connection` may not name: removing them would change who the request seems to come from."""

is_name = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
has_control = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search


def connection_tokens(headers: Headers) -> set[bytes]:
    """Find the header names that `Connection` declares hop-by-hop."""
    return {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}


def end_to_end(headers: Headers) -> Headers:
    """Take out of a request's headers those that are not passed on.

    Raises:
        ValueError: `Connection` names a header that must reach the deployment.
    """
    tokens = connection_tokens(headers)
    forbidden = tokens & PROTECTED
    if forbidden:
        raise ValueError(f"the Connection header may not name {min(forbidden).decode()!r}")
    dropped = UNUSUAL | tokens
    return [pair for pair in headers if pair[0] not in dropped]
