"""StaticFiles: types, validators, ranges, directories."""

from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from qserve import serve
from tests.instance.differential.case import Case

FOLDER = Path(__file__).parents[1] / "files" / "static"

app = FastAPI()


@app.get("/api")
def api() -> str:
    return "api"


app.mount("/static", StaticFiles(directory=FOLDER), name="static")
app.mount("/", StaticFiles(directory=FOLDER, html=True), name="site")


@serve.ingress(app)
class Served: ...


TEXT = "/static/digits.txt"
CASES = [
    Case("a file", "GET", "/static/style.css"),
    Case("HEAD", "HEAD", TEXT),
    Case("POST is not allowed", "POST", TEXT),
    Case("not modified by date", "GET", TEXT, {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}),
    Case("modified by date", "GET", TEXT, {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"}),
    Case("another ETag", "GET", TEXT, {"If-None-Match": '"other"'}),
    Case("a range", "GET", TEXT, {"Range": "bytes=10-19"}),
    Case("no such file", "GET", "/static/none.css"),
    Case("a directory", "GET", "/static/sub"),
    Case("out of the folder", "GET", "/static/..%2f..%2fconftest.py"),
    Case("index", "GET", "/"),
    Case("index of a directory", "GET", "/sub/"),
    Case("a directory without its slash", "GET", "/sub"),
    Case("the site's 404 page", "GET", "/none"),
    Case("a route before the mount", "GET", "/api"),
]
