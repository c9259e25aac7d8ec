"""Who is looking at the console, and what they may do."""

import hmac
import re
import secrets
import time
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from qserve.settings import LOOPBACK_HOSTS, Settings

COOKIE: Final = "qserve_console"
PATH: Final = "/-/console"
prefix: Final = ContextVar("qserve_console_prefix", default="")
"""What a proxy has taken off the beginning of the request's path: it is put back into links, and the cookie's path."""
_is_prefix = re.compile(r"(/[\w.~-]+){1,8}", re.ASCII).fullmatch
_LASTS_S: Final = 12 * 3600


def prefix_of(request: Request) -> str:
    """What the proxy in front says; whoever else says it, says so for themselves only."""
    said = request.headers.get("x-forwarded-prefix", "").rstrip("/")
    return said if _is_prefix(said) else ""


class Visitor(NamedTuple):
    """Somebody who may look.

    Attributes:
        name: What the audit calls them.
        may_act: Whether they are an operator; viewers only look.
        by_cookie: Whether they can log out.
    """

    name: str
    may_act: bool
    by_cookie: bool = False


class Sessions:
    """Recognizes visitors by the cookie that a token buys, by a bearer token, or by what a trusted proxy says.

    Cookies are signed with a key that follows from the tokens, so they end when a token changes.

    Args:
        operator_token: The token of the admin listener.
    """

    def __init__(self, settings: Settings, operator_token: str) -> None:
        self._operator = operator_token
        self._viewer = settings.console_viewer_token.strip()
        self._is_open = settings.console_open
        self._user_header = settings.console_user_header.lower()
        self._operators = {name.strip() for name in settings.console_operators.split(",") if name.strip()}
        self._proxies = {host.strip() for host in settings.console_proxies.split(",") if host.strip()}
        self._key = hmac.digest(f"{operator_token}\n{self._viewer}".encode(), b"qserve console", "sha256")

    def visitor(self, request: Request) -> Visitor | None:
        """Who makes a request; None for strangers."""
        host = request.client.host if request.client is not None else ""
        if self._user_header and host in self._proxies:
            name = request.headers.get(self._user_header, "")
            if name:
                return Visitor(name, "*" in self._operators or name in self._operators)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and (role := self.role_of(token.strip())):
            return Visitor(f"{role} from {host}", role == "operator")
        role = self._role_in_cookie(request)
        if role:
            return Visitor(f"{role} from {host}", role == "operator", by_cookie=True)
        if self._is_open and host in LOOPBACK_HOSTS:
            return Visitor("somebody on this machine", True)
        return None

    def role_of(self, token: str) -> str:
        """What a token makes of its bearer: "operator", "viewer", or "" for a wrong one."""
        given = token.encode()
        if hmac.compare_digest(given, self._operator.encode()):
            return "operator"
        return "viewer" if self._viewer and hmac.compare_digest(given, self._viewer.encode()) else ""

    def admit(self, response: Response, role: str, *, secure: bool) -> None:
        """Give the browser a cookie for its role."""
        text = f"{role}.{int(time.time()) + _LASTS_S}.{secrets.token_hex(8)}"
        response.set_cookie(
            *(COOKIE, f"{text}.{self._mac(text)}", _LASTS_S),
            path=prefix.get() + PATH,
            secure=secure,
            httponly=True,
            samesite="strict",
        )

    def _role_in_cookie(self, request: Request) -> str:
        try:
            jar = SimpleCookie(request.headers.get("cookie", ""))
        except CookieError:
            return ""
        text, _, mac = (jar[COOKIE].value if COOKIE in jar else "").rpartition(".")
        if not text or not mac.isascii() or not hmac.compare_digest(mac, self._mac(text)):
            return ""
        role, until, _ = text.split(".")
        return role if int(until) > time.time() else ""

    def _mac(self, text: str) -> str:
        return hmac.digest(self._key, text.encode(), "sha256").hex()
