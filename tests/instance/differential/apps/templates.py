"""Jinja2 templates, with URLs in them."""

from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from qserve import serve
from tests.instance.differential.case import Case

FILES = Path(__file__).parents[1] / "files"

app = FastAPI()
app.mount("/static", StaticFiles(directory=FILES / "static"), name="static")
templates = Jinja2Templates(FILES / "templates")


@app.get("/pages/{name}", response_class=HTMLResponse)
async def page(request: Request, name: str) -> HTMLResponse:
    return templates.TemplateResponse(
        request, "page.html", {"title": name, "items": ["<b>", "\u20ac"]}, headers={"X-Page": name}
    )


@app.get("/missing")
def missing(request: Request) -> HTMLResponse:
    return templates.TemplateResponse(request, "none.html")


@serve.ingress(app)
class Served: ...


CASES = [
    Case("a page", "GET", "/pages/one"),
    Case("what it links to", "GET", "/static/style.css"),
    Case("no such template", "GET", "/missing"),
]
