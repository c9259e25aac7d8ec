"""The applications for the rows about HTTP: the same for uvicorn alone (`app`) and for qserve (`Streaming`)."""

from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from qserve import serve

EVENTS = 10
WHOLE = {mib: bytes(mib * 2**20) for mib in (1, 16)}
app = FastAPI()


class Order(BaseModel):
    name: str
    amount: int
    tags: list[str]


@app.post("/typed")
async def typed(order: Order) -> Order:
    return order


@app.get("/events")
async def events() -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(EVENTS):
            yield f"data: {number}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


@app.get("/download")
async def download() -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(16):
            yield bytes(65536)

    return StreamingResponse(parts(), media_type="application/octet-stream")


@app.post("/upload")
async def upload(request: Request) -> int:
    return sum([len(part) async for part in request.stream()])


@app.post("/whole")
async def whole(request: Request) -> int:
    return len(await request.body())


@app.get("/whole/{mib}")
async def response(mib: int) -> Response:
    return Response(WHOLE[mib], media_type="application/octet-stream")


@app.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)


@serve.deployment(route_prefix="/streaming", max_concurrent_queries=1000)
@serve.ingress(app)
class Streaming:
    pass
