"""HTTP methods, those without a name too."""

from fastapi import FastAPI, Request, Response

from qserve import serve
from tests.instance.differential.case import Body, Case, as_json

app = FastAPI()


@app.api_route("/any", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
async def any_method(request: Request) -> Response:
    body = await request.body()
    return Response(f"{request.method} {len(body)}", headers={"X-Method": request.method})


@app.get("/get")
def get() -> str:
    return "got"


@app.head("/get")
def head(response: Response) -> None:
    response.headers["X-Head"] = "yes"


@app.patch("/patched/{number}")
def patch(number: int, changes: dict[str, int]) -> dict[str, int]:
    return {"number": number, **changes}


@app.api_route("/reports", methods=["REPORT", "PROPFIND"])
def report(request: Request) -> str:
    return request.method


@app.options("/get")
def options() -> Response:
    return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})


@serve.ingress(app)
class Served: ...


CASES = [
    *(Case(method, method, "/any") for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")),
    *(Case(f"{method} with a body", method, "/any", body=Body(b"body")) for method in ("GET", "DELETE", "HEAD", "PUT")),
    Case("TRACE", "TRACE", "/any"),
    Case("a HEAD route", "HEAD", "/get"),
    Case("an OPTIONS route", "OPTIONS", "/get"),
    Case("PATCH with JSON", "PATCH", "/patched/3", body=as_json({"x": 1})),
    Case("PROPFIND", "PROPFIND", "/reports"),
    Case("REPORT", "REPORT", "/reports"),
    Case("method not allowed", "POST", "/get"),
    Case("HEAD without a route for it", "HEAD", "/patched/3"),
]
