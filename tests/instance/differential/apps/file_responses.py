"""FileResponse: names, ranges, validators, files that are not there."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from qserve import serve
from tests.instance.differential.case import Case

FILE = Path(__file__).parents[1] / "files" / "static" / "digits.txt"

app = FastAPI()


@app.api_route("/file", methods=["GET", "HEAD"])
def file() -> FileResponse:
    return FileResponse(FILE, headers={"Cache-Control": "no-cache"})


@app.get("/named", response_class=FileResponse)
def named() -> FileResponse:
    return FileResponse(FILE, media_type="text/csv", filename="Z\u00e4hler \u20ac.csv", status_code=203)


@app.get("/inline")
def inline() -> FileResponse:
    return FileResponse(FILE, filename="digits.txt", content_disposition_type="inline")


@app.get("/gone")
def gone() -> FileResponse:
    return FileResponse("/nonexistent/file")


@serve.ingress(app)
class Served: ...


SEVERAL = r"[0-9a-f]{26}"  # the boundary between the parts is random
CASES = [
    Case("whole", "GET", "/file"),
    Case("HEAD", "HEAD", "/file"),
    Case("a range", "GET", "/file", {"Range": "bytes=0-9"}),
    Case("an open range", "GET", "/file", {"Range": "bytes=30-"}),
    Case("the end", "GET", "/file", {"Range": "bytes=-5"}),
    Case("several ranges", "GET", "/file", {"Range": "bytes=0-3, 10-12"}, mask=SEVERAL),
    Case("beyond the end", "GET", "/file", {"Range": "bytes=100-200"}),
    Case("a broken range", "GET", "/file", {"Range": "bytes=x"}),
    Case("a range, if another", "GET", "/file", {"Range": "bytes=0-9", "If-Range": '"other"'}),
    Case("HEAD of a range", "HEAD", "/file", {"Range": "bytes=0-9"}),
    Case("named", "GET", "/named"),
    Case("inline", "GET", "/inline"),
    Case("not there", "GET", "/gone"),
]
