"""HTTP basic, bearer and digest."""

from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.security import HTTPAuthorizationCredentials, HTTPBasic, HTTPBasicCredentials, HTTPBearer, HTTPDigest

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


@app.get("/basic")
def basic(given: Annotated[HTTPBasicCredentials, Depends(HTTPBasic(realm="simple"))]) -> dict[str, str]:
    return {"username": given.username, "password": given.password}


@app.get("/bearer")
def bearer(given: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    return given.credentials


@app.get("/digest")
def digest(given: Annotated[HTTPAuthorizationCredentials, Depends(HTTPDigest())]) -> str:
    return given.credentials


@serve.ingress(app)
class Served: ...


CASES = [
    Case("basic", "GET", "/basic", {"Authorization": "Basic YWRhOnNlY3JldDpvbmU="}),
    Case("basic, none", "GET", "/basic"),
    Case("basic, no base64", "GET", "/basic", {"Authorization": "Basic ???"}),
    Case("bearer", "GET", "/bearer", {"Authorization": "bearer tok.en"}),
    Case("bearer, none", "GET", "/bearer"),
    Case("digest", "GET", "/digest", {"Authorization": 'Digest username="x"'}),
    Case("digest, other scheme", "GET", "/digest", {"Authorization": "Basic YTpi"}),
]
