"""TrustedHostMiddleware, and absolute URLs built from the Host header."""

from fastapi import FastAPI, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
app.add_middleware(TrustedHostMiddleware, allowed_hosts=["good.example", "*.good.example"], www_redirect=True)


@app.get("/")
def root(request: Request) -> list[str]:
    return [str(request.url), str(request.base_url)]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("good", "GET", "/?x=1", host="good.example"),
    Case("good, with a port", "GET", "/", host="sub.good.example:8443"),
    Case("bad", "GET", "/", host="bad.example"),
    Case("in capitals", "GET", "/", host="Good.Example"),
]
