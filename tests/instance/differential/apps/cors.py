"""CORSMiddleware: preflights, simple requests, refusals."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
app.add_middleware(
    CORSMiddleware,
    allow_origins=["https://good.example"],
    allow_origin_regex=r"https://.*\.good\.example",
    allow_credentials=True,
    allow_methods=["GET", "PUT"],
    allow_headers=["X-Token"],
    expose_headers=["X-Out"],
    max_age=3600,
)


@app.get("/")
def root() -> str:
    return "root"


@app.get("/bug")
def bug() -> None:
    raise RuntimeError("a bug")


@serve.ingress(app)
class Served: ...


GOOD = {"Origin": "https://good.example"}
PUT = {"Access-Control-Request-Method": "PUT"}
CASES = [
    Case("no origin", "GET", "/"),
    Case("good origin", "GET", "/", GOOD),
    Case("good origin by pattern", "GET", "/", {"Origin": "https://a.good.example"}),
    Case("other origin", "GET", "/", {"Origin": "https://bad.example"}),
    Case("with a cookie", "GET", "/", {**GOOD, "Cookie": "a=b"}),
    Case("preflight", "OPTIONS", "/", {**GOOD, **PUT, "Access-Control-Request-Headers": "X-Token, Accept"}),
    Case("preflight of another origin", "OPTIONS", "/", {"Origin": "https://bad.example", **PUT}),
    Case("preflight of another method", "OPTIONS", "/", {**GOOD, "Access-Control-Request-Method": "DELETE"}),
    Case("preflight of another header", "OPTIONS", "/", {**GOOD, **PUT, "Access-Control-Request-Headers": "X-Other"}),
    Case("OPTIONS, no preflight", "OPTIONS", "/", GOOD),
    Case("404 of a good origin", "GET", "/nowhere", GOOD),
    Case("500 of a good origin", "GET", "/bug", GOOD),
]
