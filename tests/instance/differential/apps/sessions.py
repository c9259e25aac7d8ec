"""SessionMiddleware: the session travels in a signed cookie."""

from fastapi import FastAPI, Request
from starlette.middleware.sessions import SessionMiddleware

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
app.add_middleware(SessionMiddleware, secret_key="not a secret", session_cookie="sid", max_age=3600, same_site="strict")


@app.post("/count")
def count(request: Request) -> int:
    request.session["count"] = request.session.get("count", 0) + 1
    return int(request.session["count"])


@app.get("/read")
def read(request: Request) -> dict[str, object]:
    return dict(request.session)


@app.post("/clear")
def clear(request: Request) -> str:
    request.session.clear()
    return "cleared"


@serve.ingress(app)
class Served: ...


SIGNED = r"sid=[^;]{8,}"  # the time stands in it
CASES = [
    Case("empty", "GET", "/read"),
    Case("first", "POST", "/count", cookies=True, mask=SIGNED),
    Case("second", "POST", "/count", cookies=True, mask=SIGNED),
    Case("read", "GET", "/read", cookies=True, mask=SIGNED),
    Case("a forged one", "GET", "/read", {"Cookie": "sid=eyJjb3VudCI6IDk5fQ==.aaaa.bbbb"}),
    Case("cleared", "POST", "/clear", cookies=True),
    Case("after that", "GET", "/read", cookies=True),
]
