"""Pages from templates. Everything that users wrote is escaped by Jinja; nothing is marked as safe but our own SVG."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from qserve.tracebacks import gist
from qserve_gateway.console.sessions import PATH, prefix

_FOLDER: Final = Path(__file__).parent
STATIC: Final = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "uPlot.iife.min.js": "text/javascript; charset=utf-8",
    "uPlot.min.css": "text/css; charset=utf-8",
    "uPlot.LICENSE": "text/plain; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: then browsers say of our own forms that they come from nowhere.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NO_STORE: Final = {"Cache-Control": "no-store"}


class Rendering:
    """Makes pages. Thread-safe.

    Args:
        facts: What every template may use.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(facts)
        self._environment.filters.update(
            ago=ago,
            clock=clock,
            seconds=seconds,
            ms=milliseconds,
            number=number,
            spark=spark,
            pretty=pretty,
            gist=lambda text: gist(text)[:200],
        )

    def page(self, template: str, code: int = 200, **facts: Any) -> Response:
        """A whole page."""
        text = self._environment.get_template(template).render(_place() | facts)
        return HTMLResponse(text, code, {**HEADERS, **_NO_STORE})

    def block(self, template: str, block: str, **facts: Any) -> str:
        """One block of a page, for the event stream."""
        found = self._environment.get_template(template)
        context = found.new_context(_place() | facts)
        return "".join(found.blocks[block](context))


def _place() -> dict[str, str]:
    return {"prefix": prefix.get(), "base": prefix.get() + PATH}


def static_file(name: str) -> Response:
    """One of the files that pages use."""
    return Response(
        (_FOLDER / "static" / name).read_bytes(),
        200,
        {
            **HEADERS,
            "Cache-Control": "max-age=3600",
            "Content-Type": STATIC[name],
        },
    )


def ago(at: float | None) -> str:
    """How long ago something was."""
    return (
        "-"
        if not at
        else f"{seconds(max(0.0, time.time() - at))} ago"
        if at <= time.time() + 1
        else (f"in {seconds(at - time.time())}")
    )


def clock(at: float | None) -> str:
    """A date and a time of this machine, with its time zone: who looks may be in another one."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at)) if at else "-"


def seconds(value: float | None) -> str:
    """A span in the unit that fits."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    for size, unit in ((60, "s"), (3600, "min"), (86_400, "h")):
        if value < size:
            return f"{value / max(1, size // 60 if unit != 'h' else 3600):.1f} {unit}".replace(".0 ", " ")
    return f"{value / 86_400:.1f} d"


def milliseconds(value: float | None) -> str:
    """A time that calls took."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.2f} ms"
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def number(value: float) -> str:
    """A number with thousands apart; a fraction only where it matters."""
    if isinstance(value, float) and value < 100 and value != int(value):
        return f"{value:.1f}"
    return f"{int(value):,}".replace(",", "\u202f")


def pretty(value: Any) -> str:
    """JSON for people."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def spark(counts: Sequence[int], width: int = 122, height: int = 26) -> Markup:
    """A small curve of counts; numbers only, so there is nothing to escape."""
    most = max(counts, default=0) or 1
    step = width / max(1, len(counts) - 1)
    points = [(place * step, height - 2 - (height - 4) * count / most) for place, count in enumerate(counts)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"0,{height} {line} {width},{height}"
    return Markup(  # noqa: S704
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<polygon points="{area}"/><polyline points="{line}"/></svg>'
    )
