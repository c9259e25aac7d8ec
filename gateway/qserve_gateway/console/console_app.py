"""The console as an ASGI application: who may come in, and which page or action a request is for."""

import asyncio
import contextlib
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from qserve.broker.instance.state import State
from qserve.broker.redis_errors import CommandRefused
from qserve.errors import ConfigurationError, QServeError
from qserve.settings import Settings
from qserve_gateway.console.actions import ACTIONS, Actions
from qserve_gateway.console.live import MOST_STREAMS, LiveStreams
from qserve_gateway.console.orders import NotPossible
from qserve_gateway.console.pages import Asked, BadFilter, Pages
from qserve_gateway.console.rendering import HEADERS, STATIC, Rendering, static_file
from qserve_gateway.console.sessions import COOKIE, PATH, Sessions, Visitor, prefix, prefix_of

LARGEST_FORM: Final = 256 * 1024
_WRONG_TOKEN_S: Final = 0.3
_MOST_SAID: Final = 256
_SERIES: Final = re.compile(r"/deployments/([^/]+)/series").fullmatch


class Console:
    """Answers requests for paths below /-/console.

    Pages only show; whatever acts is a POST of an operator, from a page of our own.
    """

    def __init__(self, settings: Settings, state: State, token: str) -> None:
        self._sessions = Sessions(settings, token)
        self._pages = Pages(state, settings)
        self._actions = Actions(state, settings)
        self._streams = LiveStreams()
        self._said: dict[str, str] = {}
        label = settings.console_label
        facts = {"namespace": settings.namespace, "label": label, "actions": ACTIONS}
        self._rendering = Rendering(facts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        prefix.set(prefix_of(request))
        with contextlib.suppress(ClientDisconnect):
            response = await self._answer(request)
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path.removeprefix(PATH)
        if path.startswith("/static/"):
            return self._static(request, path.removeprefix("/static/"))
        visitor = self._sessions.visitor(request)
        if path == "/login":
            return await self._log_in(request)
        if visitor is None:
            wants_page = request.method in ("GET", "HEAD") and path != "/live"
            return self._login_page(request, 401) if wants_page else self._message(401, "Log in first.", None)
        try:
            return await self._serve(request, path, visitor)
        except (BadFilter, QServeError, CommandRefused) as exc:
            return self._message(_status_of(exc), f"{exc}.", visitor)

    async def _serve(self, request: Request, path: str, visitor: Visitor) -> Response:
        allowed = "POST" if path in ("/act", "/logout") else "GET, HEAD"
        if request.method not in allowed.split(", "):
            return self._message(405, f"Only {allowed}.", visitor, {"Allow": allowed})
        if path == "/logout":
            return self._log_out()
        return await (self._act(request, visitor) if path == "/act" else self._show(request, path, visitor))

    # Looking

    async def _show(self, request: Request, path: str, visitor: Visitor) -> Response:
        query = {name: value for name, value in request.query_params.items() if value}
        said = self._said.pop(query.pop("done", ""), "")
        series = _SERIES(path)
        if series is not None:
            span = query.get("range", "1h")
            return JSONResponse(
                await asyncio.to_thread(self._pages.series, unquote(series[1]), span),
                headers={**HEADERS, "Cache-Control": "no-store"},
            )
        if path == "/live":
            return await self._live(query, visitor)
        asked = Asked(unquote(path).rstrip("/"), query, visitor)
        return await asyncio.to_thread(self._page, asked, said)

    def _page(self, asked: Asked, said: str) -> Response:
        found = self._pages.find(asked)
        if found is None:
            return self._message(404, "There is no such page.", asked.visitor)
        template, facts = found
        return self._rendering.page(template, **facts, said=said)

    async def _live(self, asks: Mapping[str, str], visitor: Visitor) -> Response:
        path, _, text = asks.get("of", "").removeprefix(prefix.get()).removeprefix(PATH).partition("?")
        query = {name: values[-1] for name, values in parse_qs(text).items() if name != "done"}
        asked = Asked(unquote(path).rstrip("/"), query, visitor)

        def render() -> str:
            try:
                found = self._pages.find(asked)
            except (QServeError, CommandRefused, BadFilter) as exc:
                return self._rendering.block("message.html", "live", status=0, text=str(exc))
            if found is None:
                return ""
            return self._rendering.block(found[0], "live", **found[1])

        if "once" in asks:
            return HTMLResponse(await asyncio.to_thread(render), headers={**HEADERS, "Cache-Control": "no-store"})
        if self._streams.is_full:
            return self._message(503, f"{MOST_STREAMS} pages are open already.", visitor)
        page = (prefix.get(), asked.path, *sorted(query.items()), visitor.may_act)
        return self._streams.response(page, render)

    # Acting

    async def _act(self, request: Request, visitor: Visitor) -> Response:
        if not visitor.may_act:
            return self._message(403, "Viewers only look. Log in with an operator's token to act.", visitor)
        form = await self._form(request)
        if isinstance(form, Response):
            return form
        name, about = _last(form, "action"), _last(form, "about")
        back = _own_path(_last(form, "back"))
        if name not in ACTIONS:
            return self._message(400, f"There is no action {name[:40]!r}.", visitor)
        if _last(form, "confirmed") != "yes":
            question = ACTIONS[name].question.format(about=about)
            fields = [(key, value) for key, values in form.items() for value in values if key != "confirmed"]
            return self._rendering.page(
                "confirm.html",
                **self._facts(visitor),
                question=question,
                fields=fields,
                label=ACTIONS[name].label,
                back=back,
                count=len(form.get("id", [])),
            )
        try:
            done = await asyncio.to_thread(self._actions.run, visitor, name, about, form)
        except NotPossible as exc:
            return self._message(409, f"Nothing was done: {exc}.", visitor, back=back)
        place, key = done.place or back, secrets.token_urlsafe(8)
        self._said[key] = done.said
        if len(self._said) > _MOST_SAID:
            self._said.pop(next(iter(self._said)))
        return _redirect(f"{place}{'&' if '?' in place else '?'}done={key}")

    async def _form(self, request: Request) -> dict[str, list[str]] | Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        visitor = self._sessions.visitor(request)
        if kind != "application/x-www-form-urlencoded":
            return self._message(415, "Forms are application/x-www-form-urlencoded.", visitor)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_FORM:
                return self._message(413, f"A form has {LARGEST_FORM:,} bytes at most.", visitor)
        try:
            return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=5_000)
        except ValueError as exc:
            return self._message(400, f"This is no form: {exc}.", visitor)

    # Coming and going

    async def _log_in(self, request: Request) -> Response:
        if request.method in ("GET", "HEAD"):
            return self._login_page(request, 200)
        if request.method != "POST":
            return self._message(405, "Only GET and POST.", None, {"Allow": "GET, HEAD, POST"})
        form = await self._form(request)
        if isinstance(form, Response):
            return form
        role = self._sessions.role_of(_last(form, "token").strip())
        if not role:
            await asyncio.sleep(_WRONG_TOKEN_S)
            return self._login_page(request, 401, "This token is neither an operator's nor a viewer's.")
        response = _redirect(_own_path(_last(form, "back")))
        self._sessions.admit(response, role, secure=request.url.scheme == "https")
        return response

    def _log_out(self) -> Response:
        response = _redirect(f"{PATH}/login")
        response.delete_cookie(COOKIE, path=prefix.get() + PATH, httponly=True, samesite="strict")
        return response

    def _login_page(self, request: Request, status: int, problem: str = "") -> Response:
        back = request.url.path if request.url.path != f"{PATH}/login" else PATH
        return self._rendering.page("login.html", status, **self._facts(None), problem=problem, back=_own_path(back))

    # Answers

    def _static(self, request: Request, name: str) -> Response:
        if name not in STATIC or request.method not in ("GET", "HEAD"):
            return self._message(404, "There is no such file.", None)
        return static_file(name)

    def _message(
        self,
        status: int,
        text: str,
        visitor: Visitor | None,
        headers: Mapping[str, str] | None = None,
        back: str = PATH,
    ) -> Response:
        response = self._rendering.page(
            "message.html", status, **self._facts(visitor), status=status, text=text[:1].upper() + text[1:], back=back
        )
        response.headers.update(headers or {})
        return response

    @staticmethod
    def _facts(visitor: Visitor | None) -> dict[str, Any]:
        return {"visitor": visitor, "path": "", "query": {}, "here": ""}


def _status_of(error: Exception) -> int:
    if isinstance(error, BadFilter):
        return 400
    if isinstance(error, ConfigurationError):  # Redis does not let this gateway do that
        return 403
    return error.status if isinstance(error, QServeError) else 503


def _redirect(place: str) -> RedirectResponse:
    return RedirectResponse(prefix.get() + place, 303, HEADERS)


def _own_path(text: str) -> str:
    """A path of the console, whatever somebody asks to be led to."""
    return text if re.fullmatch(rf"{re.escape(PATH)}(/[\w./%-]*)?(\?[\w.=&%+~-]*)?", text, re.ASCII) else PATH


def _last(form: Mapping[str, list[str]], name: str) -> str:
    return (form.get(name) or [""])[-1]
