"""OAuth2 with password, bearer tokens and scopes."""

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Security
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm, SecurityScopes

from qserve import serve
from tests.instance.differential.case import Case, as_form

app = FastAPI(swagger_ui_init_oauth={"clientId": "me", "usePkceWithAuthorizationCodeGrant": True})
bearer = OAuth2PasswordBearer("token", scopes={"read": "Read", "write": "Write"})


def user(scopes: SecurityScopes, token: Annotated[str, Depends(bearer)]) -> str:
    name, _, granted = token.partition(":")
    if not set(scopes.scopes) <= set(granted.split(",")):
        challenge = f'Bearer scope="{scopes.scope_str}"'
        raise HTTPException(401, "Not enough permissions", {"WWW-Authenticate": challenge})
    return name


@app.post("/token")
def token(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> dict[str, str]:
    if form.password != "right":
        raise HTTPException(400, "Incorrect username or password")
    return {"access_token": f"{form.username}:{','.join(form.scopes)}", "token_type": "bearer"}


@app.get("/read")
def read(name: Annotated[str, Security(user, scopes=["read"])]) -> str:
    return name


@serve.ingress(app)
class Served: ...


CASES = [
    Case("log in", "POST", "/token", body=as_form(username="ada", password="right", scope="read write")),
    Case("log in, wrong password", "POST", "/token", body=as_form(username="ada", password="no")),
    Case("log in, nothing sent", "POST", "/token"),
    Case("with a token", "GET", "/read", {"Authorization": "Bearer ada:read,write"}),
    Case("with too small a token", "GET", "/read", {"Authorization": "Bearer ada:write"}),
    Case("without a token", "GET", "/read"),
    Case("with another scheme", "GET", "/read", {"Authorization": "Basic YTpi"}),
    Case("docs know the redirect", "GET", "/docs"),
    Case("the redirect page", "GET", "/docs/oauth2-redirect"),
    Case("described", "GET", "/openapi.json"),
]
