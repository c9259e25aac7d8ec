"""An ASGI callable of one's own, which says things that no framework says."""

from starlette.types import Receive, Scope, Send

from qserve import serve
from tests.instance.differential.case import Body, Case

START = {"type": "http.response.start", "status": 200}
END = {"type": "http.response.body"}


async def parts(_: Scope, _receive: Receive, send: Send) -> None:
    await send({**START, "headers": [(b"x-parts", b"3")]})
    for part in (b"one", b"two"):
        await send({**END, "body": part, "more_body": True})
    await send(END)


async def no_headers(_: Scope, _receive: Receive, send: Send) -> None:
    await send(START)
    await send({**END, "body": b"bare"})


async def capitals(_: Scope, _receive: Receive, send: Send) -> None:
    await send({**START, "headers": [(b"X-Capital", b" padded "), (b"x-CAPITAL", b"2")]})
    await send({**END, "body": b""})


async def generators(_: Scope, _receive: Receive, send: Send) -> None:
    await send({**START, "headers": ((name, b"1") for name in (b"x-a", b"x-b"))})
    await send({**END, "body": b"generated"})


async def nothing(_: Scope, _receive: Receive, _send: Send) -> None: ...


async def raises(_: Scope, _receive: Receive, _send: Send) -> None:
    raise ValueError("before anything was sent")


async def echo(_: Scope, receive: Receive, send: Send) -> None:
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({**START, "status": 201, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({**END, "body": body})


async def tell(scope: Scope, _: Receive, send: Send) -> None:
    await send({**START, "status": 404, "headers": [(b"content-type", b"text/x-none")]})
    await send({**END, "body": scope["raw_path"] + b" " + scope["query_string"]})


async def two_responses(_: Scope, _receive: Receive, send: Send) -> None:
    for status, body in ((200, b"first"), (500, b"second")):
        await send({**START, "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({**END, "body": body})


async def more_after_the_end(_: Scope, _receive: Receive, send: Send) -> None:
    await send({**START, "headers": [(b"content-length", b"5")]})
    for body in (b"whole", b"other"):
        await send({**END, "body": body})


async def no_beginning(_: Scope, _receive: Receive, send: Send) -> None:
    await send({**END, "body": b"only a body"})


PATHS = {
    "/parts": parts,
    "/no-headers": no_headers,
    "/capitals": capitals,
    "/generators": generators,
    "/nothing": nothing,
    "/raises": raises,
    "/echo": echo,
    "/two-responses": two_responses,
    "/more-after-the-end": more_after_the_end,
    "/no-beginning": no_beginning,
}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise RuntimeError("only http")
    await PATHS.get(scope["path"].removeprefix(scope["root_path"]), tell)(scope, receive, send)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("parts", "GET", "/parts"),
    Case("no headers", "GET", "/no-headers"),
    Case("headers in capitals", "GET", "/capitals"),
    Case("headers from a generator", "GET", "/generators"),
    Case("nothing sent", "GET", "/nothing"),
    Case("an exception", "GET", "/raises"),
    Case("an echo", "POST", "/echo", body=Body(b"echo")),
    Case("an echo of chunks", "POST", "/echo", body=Body((b"e", b"cho"))),
    Case("raw path and query", "GET", "/%7Ea/b?c=%20"),
    Case("HEAD of parts", "HEAD", "/parts"),
    Case("a second response", "GET", "/two-responses"),
    Case("more after the end", "GET", "/more-after-the-end"),
    Case("a body without a beginning", "GET", "/no-beginning"),
]
