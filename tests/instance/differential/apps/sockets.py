"""WebSockets: `test_same_websockets.py` talks to them; the cases here only knock."""

from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request, WebSocket, WebSocketException, status
from starlette.websockets import WebSocketDisconnect

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
seen: list[object] = []


def known(token: Annotated[str | None, Query()] = None) -> str:
    if token is None:
        raise WebSocketException(status.WS_1008_POLICY_VIOLATION, "no token")
    return token


@app.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                seen.append(message.get("code"))
                return
            if message.get("text") is not None:
                await socket.send_text(message["text"])
            else:
                await socket.send_bytes(message["bytes"])
    except WebSocketDisconnect as exc:
        seen.append(exc.code)


@app.websocket("/scope/{name}")
async def scope(socket: WebSocket, name: str, number: int = 0) -> None:
    await socket.accept(subprotocol=(socket.scope["subprotocols"] or [None])[-1], headers=[(b"x-own", b"yes")])
    await socket.send_json(
        {
            "name": name,
            "number": number,
            "url": str(socket.url),
            "root_path": socket.scope["root_path"],
            "path": socket.scope["path"],
            "cookie": socket.cookies.get("a"),
            "state": type(socket.scope["state"]).__name__,
            "offered": socket.scope["subprotocols"],
        }
    )
    await socket.close()


@app.websocket("/close/{code}")
async def close(socket: WebSocket, code: int) -> None:
    await socket.accept()
    await socket.send_text("last")
    await socket.close(code, "as asked")


@app.websocket("/refuse")
async def refuse(socket: WebSocket) -> None:
    await socket.close(4003)


@app.websocket("/token")
async def token(socket: WebSocket, value: Annotated[str, Depends(known)]) -> None:
    await socket.accept()
    await socket.send_text(value)
    await socket.close()


@app.websocket("/bug")
async def bug(socket: WebSocket) -> None:
    await socket.accept()
    raise ValueError("a bug")


@app.websocket("/bug-before")
async def bug_before(socket: WebSocket) -> None:
    raise ValueError("a bug")


@app.websocket("/returns")
async def returns(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("and out")


@app.websocket("/returns-before")
async def returns_before(socket: WebSocket) -> None: ...


@app.get("/seen")
def get_seen(request: Request) -> list[object]:
    return seen


@serve.ingress(app)
class Served: ...


CASES = [
    Case("no WebSocket where one is", "GET", "/echo"),
    Case("beside them", "GET", "/seen"),
]
