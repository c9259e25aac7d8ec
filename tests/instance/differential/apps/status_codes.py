"""Status codes, and answers that have no body."""

from fastapi import FastAPI, Response, status
from fastapi.responses import JSONResponse
from starlette.requests import Request

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


@app.post("/created", status_code=status.HTTP_201_CREATED)
def created() -> dict[str, str]:
    return {"made": "yes"}


@app.delete("/gone", status_code=204)
def gone() -> None: ...


@app.get("/no-content")
def no_content() -> Response:
    return Response(status_code=204, headers={"X-Still": "here"})


@app.get("/reset")
def reset() -> Response:
    return Response(status_code=205)


@app.get("/not-modified")
def not_modified() -> Response:
    return Response(status_code=304, headers={"ETag": '"x"', "Cache-Control": "max-age=1"})


@app.get("/changed")
def changed(response: Response) -> str:
    response.status_code = 202
    response.headers["X-Changed"] = "yes"
    return "changed"


@app.get("/any/{code}")
async def any_code(request: Request, code: int) -> Response:
    return JSONResponse({"code": code}, code)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("201", "POST", "/created"),
    Case("204 by declaration", "DELETE", "/gone"),
    Case("204 by response", "GET", "/no-content"),
    Case("205", "GET", "/reset"),
    Case("304", "GET", "/not-modified"),
    Case("changed on the way", "GET", "/changed"),
    Case("418", "GET", "/any/418"),
    Case("299", "GET", "/any/299"),
    Case("451", "GET", "/any/451"),
    Case("507", "GET", "/any/507"),
    Case("599", "GET", "/any/599"),
]
