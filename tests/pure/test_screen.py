"""What a terminal shows: a line to try each deployment, and the lines of user code and of the log that are worth it."""

import io
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.requests import Request

from qserve import serve
from qserve.screen.introduction import introduction
from qserve.screen.samples import command_for
from qserve.screen.terminal import as_shown
from qserve.tracebacks import gist, users_part
from qserve_workers.user.user_output import NamedOutput

URL = "http://127.0.0.1:8000/x"


def plain() -> str:
    return "ok"


def greet(request: Request) -> str:
    return request.query_params["name"]


async def square(request: Request) -> str:
    return str(int(request.query_params["n"]) ** 2) + request.query_params.get("unit", "")


def total(request: Request) -> int:
    return sum(map(int, request.query_params["numbers"].split(",")))


async def summarize(request: Request) -> int:
    data = await request.json()
    return len(data["text"]) + int(data["n"])


async def echo(request: Request) -> bytes:
    return await request.body()


async def upload(request: Request) -> str:
    return str(await request.form())


async def count(_request: Request) -> Any:
    yield "1"


class WithoutCall:
    def _hidden(self) -> None: ...

    def reconfigure(self, config: dict[str, int]) -> None: ...

    def add(self, a: int, items: list[str], *, scale: float, unit: str = "m") -> str:
        return f"{a}{items}{scale}{unit}"


class ForArrays:
    def __call__(self, array: bytes) -> bytes:
        return array


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (plain, f"curl {URL}"),
        (greet, f"curl '{URL}?name=Ada'"),
        (square, f"curl '{URL}?n=1'"),
        (total, f"curl '{URL}?numbers=1,2,3'"),
        (summarize, f"""curl {URL} -H 'content-type: application/json' -d '{{"text": "hello", "n": 1}}'"""),
        (echo, f"curl {URL} -d hello"),
        (upload, None),
        (count, f"curl -N {URL}"),
        (WithoutCall, """qserve call it add 1 '["hello"]' scale=1.5"""),
    ],
)
def test_the_line_to_try_a_deployment_gives_it_what_its_code_asks_for(code: Any, command: str | None) -> None:
    assert command_for(serve.deployment(code).options(name="it"), URL) == command


def test_a_deployment_without_a_route_is_called_with_arguments_of_its_types() -> None:
    def add(a: int, b: int = 2) -> int:
        return a + b

    def anything(value: Any) -> Any:
        return value

    assert command_for(serve.deployment(name="add")(add), None) == "qserve call add 1"
    assert command_for(serve.deployment(name="it")(anything), None) is None
    assert command_for(serve.deployment(name="it")(ForArrays), None) is None


def ingress_of(app: Any) -> Any:
    @serve.deployment(name="it")
    @serve.ingress(app)
    class It: ...

    return It


def test_of_a_fastapi_application_the_documentation_is_shown() -> None:
    assert command_for(ingress_of(FastAPI()), URL) == f"curl {URL}/docs"
    assert command_for(ingress_of(FastAPI(docs_url="/help")), URL) == f"curl {URL}/help"


def test_without_documentation_it_is_a_route_that_asks_for_nothing() -> None:
    app = FastAPI(docs_url=None, openapi_url=None)

    @app.get("/items/{item}")
    def item(item: int) -> int:
        return item

    @app.get("/search")
    def search(q: str) -> str:
        return q

    @app.get("/secret", dependencies=[Depends(plain)])
    def secret() -> str:
        return "s"

    assert command_for(ingress_of(app), URL) is None

    @app.get("/all")
    def all_of_them(limit: int = 3) -> int:
        return limit

    assert command_for(ingress_of(app), URL) == f"curl {URL}/all"


def test_the_introduction_fits_on_a_screen_however_much_is_deployed() -> None:
    many = [serve.deployment(name=f"d{number}")(plain) for number in range(40)]
    hidden = serve.deployment(name="hidden", route_prefix=None)(ForArrays)
    lines = introduction([*many, hidden], lambda prefix: f"http://h{prefix}", console="http://c")
    assert len(lines) <= 14
    assert "  and 32 more: qserve status" in lines
    assert "  for handles only: hidden" in lines
    assert any("http://c" in line for line in lines)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("16:02:11 INFO    qserve.node: gateway: pid 1.", None),
        ("2026-03-01 16:02:11,042 DEBUG   node[12] qserve.node: hm", None),
        ("16:02:11 WARNING qserve.node: worker ended", "16:02:11 WARNING worker ended"),
        (
            "2026-03-01 16:02:11,042 ERROR   replica[12] [Echo#1 abc] qserve_workers.calls.x: no: why",
            "16:02:11 ERROR [Echo#1] no: why",
        ),
        ("Echo | printed | so", "Echo | printed | so"),
        ("Echo | 2026-03-01 16:02:11,042 INFO    shop: sold", "Echo | INFO sold"),
        ("16:02:11 200 GET /x 1.0 ms Echo", "16:02:11 200 GET /x 1.0 ms Echo"),
        ("whatever a C library says", "whatever a C library says"),
    ],
)
def test_of_the_log_warnings_are_shown_and_of_user_code_everything(line: str, shown: str | None) -> None:
    assert as_shown(line) == shown


def test_a_traceback_begins_with_the_users_frame() -> None:
    frames = '  File "/x/qserve_workers/calls/running.py", line 1, in run\n    await it\n'
    users = '  File "/home/me/app.py", line 3, in f\n    return {}["x"]\n'
    head = "Traceback (most recent call last):\n"
    assert users_part(f"{head}{frames}{users}KeyError: 'x'") == f"{head}{users}KeyError: 'x'"
    assert users_part(f"{head}{frames}KeyError: 'x'") == "KeyError: 'x'"


def frames(*places: str) -> str:
    return "".join(f'  File "{place}", line 3, in f\n    g()\n     ~^^\n' for place in places)


FASTAPI = ("/v/lib/python3.11/site-packages/fastapi/routing.py", "/v/lib/python3.11/site-packages/starlette/routing.py")
WORKERS = ("/x/qserve_workers/user/threads.py",)
HOME = ("/home/me/app.py",)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((*FASTAPI, *WORKERS, *HOME), HOME),
        ((*FASTAPI, "/usr/lib/python3.11/contextlib.py", "/v/dist-packages/anyio/to_thread.py", *HOME), HOME),
        ((*WORKERS, *HOME, *FASTAPI, "/home/me/view.py"), (*HOME, "/home/me/view.py")),
        ((*WORKERS, "/v/lib/site-packages/qserve/batching.py", *HOME), HOME),
        ((*WORKERS, *HOME, "/usr/lib/python3.11/asyncio/tasks.py", "/home/me/view.py"), None),
        ((*HOME, *FASTAPI), None),
        ((*HOME, "/v/lib/site-packages/qserve/calls/ref.py"), None),
        ((*FASTAPI, *WORKERS), FASTAPI),
        (("/home/me/fastapi/app.py", "/home/me/starlette/app.py", "/home/me/qserve/app.py"), None),
    ],
)
def test_frames_of_frameworks_that_only_lead_to_user_code_are_left_out(
    given: tuple[str, ...], shown: tuple[str, ...] | None
) -> None:
    head, error = "Traceback (most recent call last):\n", "KeyError: 'x'\n  and more"
    wanted = shown if shown is not None else tuple(place for place in given if place not in WORKERS)
    text = f"Before\n{head}{frames(*given)}{error}"
    assert users_part(f"{text}\n{text}") == "\n".join([f"Before\n{head}{frames(*wanted)}{error}"] * 2)


def test_what_user_code_prints_has_the_name_of_its_deployment() -> None:
    seen = io.StringIO()
    output = NamedOutput(seen, "Echo")
    print("a", end="", file=output)
    assert seen.getvalue() == ""
    print("b\nc", file=output)
    print("10 %\r20 %\r", file=output)
    output.write("last")
    output.close()
    assert seen.getvalue() == "Echo | ab\nEcho | c\nEcho | 20 %\nEcho | last\n"
    assert output.writable()


def test_a_terminal_that_is_gone_does_no_harm_to_user_code() -> None:
    class Gone(io.StringIO):
        def write(self, _text: str, /) -> int:
            raise BrokenPipeError

    print("hello", file=NamedOutput(Gone(), "Echo"))


def test_the_gist_of_an_error_is_what_it_says_and_not_where_it_stands() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\n    g()\n    ~^^\nKeyError: 1\nand more\n'
    assert gist(f"TaskError(KeyError): {trace}") == gist(trace) == "KeyError: 1"
    assert gist("\n OutOfPaper: tray 2\nis empty") == "OutOfPaper: tray 2"
    assert gist("  \n") == gist("") == ""
