"""What a request knows of its own URL."""

from fastapi import FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


@app.get("/here/{rest:path}", name="here")
def here(request: Request, rest: str) -> dict[str, object]:
    url = request.url
    return {
        "url": str(url),
        "parts": [url.scheme, url.hostname, url.port, url.path, url.query],
        "base": str(request.base_url),
        "for": str(request.url_for("here", rest="x y/z")),
        "path for": str(request.app.url_path_for("here", rest="q")),
        "changed": str(url.include_query_params(added=1).replace(scheme="wss")),
        "scope": [request.scope["path"], request.scope["raw_path"].decode(), request.scope["root_path"]],
        "http": [request.scope["http_version"], request.scope["scheme"], request.scope["method"]],
    }


@app.get("/server")
def server(request: Request) -> list[object]:
    return [request.scope["server"][0], request.url.hostname, request.url.path]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("simple", "GET", "/here/a?b=c"),
    Case("encoded", "GET", "/here/%C3%BC%20%2F?b=%C3%BC"),
    Case("the prefix again", "GET", "/here/urls/here/"),
    Case("another host", "GET", "/here/", host="other.example"),
    Case("an IPv6 host", "GET", "/here/", host="[::1]:99"),
    Case("HTTP/1.0", "GET", "/here/", version="1.0"),
    Case("HTTP/1.0 without a host", "GET", "/server", version="1.0", host=None),
    Case("double slashes", "GET", "//here//x"),
]
