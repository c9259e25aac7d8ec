"""Documentation elsewhere, servers of one's own, a schema function of one's own."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI(
    docs_url=None,
    redoc_url=None,
    openapi_url="/api/v1/schema.json",
    servers=[{"url": "https://stag.example", "description": "Staging"}],
)


@app.get("/things")
def things() -> list[str]:
    return []


@app.get("/manual", include_in_schema=False)
async def manual() -> HTMLResponse:
    return get_swagger_ui_html(openapi_url=str(app.openapi_url), title="Manual", swagger_js_url="/static/ui.js")


@app.get("/reference", include_in_schema=False)
async def reference() -> HTMLResponse:
    return get_redoc_html(openapi_url=str(app.openapi_url), title="Reference")


def schema() -> dict[str, Any]:
    if not app.openapi_schema:
        app.openapi_schema = get_openapi(title="Own", version="3", routes=app.routes, servers=app.servers)
        app.openapi_schema["info"]["x-logo"] = {"url": "https://logo.example"}
    return app.openapi_schema


app.openapi = schema  # type: ignore[method-assign]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("no docs where they usually are", "GET", "/docs"),
    Case("no schema where it usually is", "GET", "/openapi.json"),
    Case("the schema", "GET", "/api/v1/schema.json"),
    Case("docs of one's own", "GET", "/manual"),
    Case("redoc of one's own", "GET", "/reference"),
]
