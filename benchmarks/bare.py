"""The upper limit: the handler of examples/noop.py in the process of the server, with no queue at all."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


async def noop(request: Request) -> Response:
    return PlainTextResponse("ok")


app = Starlette(routes=[Route("/noop", noop)])
