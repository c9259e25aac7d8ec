"""Uploaded files."""

from typing import Annotated

from fastapi import FastAPI, File, Form, UploadFile

from qserve import serve
from tests.instance.differential import case
from tests.instance.differential.case import Body, Case, as_form, as_multipart

app = FastAPI()


@app.post("/bytes")
def whole(file: Annotated[bytes, File()]) -> int:
    return len(file)


@app.post("/upload")
async def upload(file: UploadFile) -> dict[str, object]:
    data = await file.read()
    return {
        "name": file.filename,
        "type": file.content_type,
        "size": file.size,
        "headers": file.headers.items(),
        "sum": sum(data),
    }


@app.post("/several")
async def several(files: list[UploadFile], note: Annotated[str, Form()] = "none") -> dict[str, object]:
    return {"files": [(file.filename, (await file.read()).decode()) for file in files], "note": note}


@app.post("/optional")
def optional(file: UploadFile | None = None) -> str | None:
    return file.filename if file else None


@serve.ingress(app)
class Served: ...


LARGE = bytes(range(256)) * 5_000
CASES = [
    Case("as bytes", "POST", "/bytes", body=as_multipart(("file", case.File("a.txt", b"hello")))),
    Case("uploaded", "POST", "/upload", body=as_multipart(("file", case.File("a.bin", b"\0\xff\r\n", "image/png")))),
    Case("larger than memory buffers", "POST", "/upload", body=as_multipart(("file", case.File("large", LARGE, None)))),
    Case("non-ASCII name", "POST", "/upload", body=as_multipart(("file", case.File("\u20ac \u00fc.txt", b"x")))),
    Case("empty file", "POST", "/upload", body=as_multipart(("file", case.File("empty", b"")))),
    Case("missing", "POST", "/upload", body=as_form(other="x")),
    Case("a field instead", "POST", "/upload", body=as_multipart(("file", "text"))),
    Case(
        "several and a field",
        "POST",
        "/several",
        body=as_multipart(
            ("files", case.File("a", b"1")),
            ("note", "two files"),
            ("files", case.File("b", b"2")),
        ),
    ),
    Case("optional and absent", "POST", "/optional"),
    Case(
        "in chunks",
        "POST",
        "/upload",
        body=Body(
            (
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="c"\r\n',
                b"\r\nfirst",
                b"second\r\n--x--\r\n",
            ),
            "multipart/form-data; boundary=x",
        ),
    ),
]
