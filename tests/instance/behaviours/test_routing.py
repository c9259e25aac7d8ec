"""Which deployment gets a request, and what it sees of the path."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from qserve import serve
from qserve.testing import TestInstance

pytestmark = pytest.mark.usefixtures("qserve_instance")


def test_the_longest_prefix_of_whole_segments_wins(http: httpx.Client) -> None:
    @serve.deployment
    def hello(request: Request) -> str:
        return f"{request.scope['root_path']} {request.url.path}"

    hello.deploy()
    assert http.get("/hellos").status_code == 404
    assert http.get("/other").status_code == 404
    serve.run([hello.options(name="nested", route_prefix="/hello/nested"), hello.options(name="r", route_prefix="/")])

    seen = {path: http.get(path).text for path in ("/hello", "/hello/", "/hello/a", "/hello/nested/b", "/hellos", "/")}

    assert seen == {
        "/hello": "/hello /hello",
        "/hello/": "/hello /hello/",
        "/hello/a": "/hello /hello/a",
        "/hello/nested/b": "/hello/nested /hello/nested/b",
        "/hellos": " /hellos",
        "/": " /",
    }


def test_the_route_table_is_exact_at_once_after_every_deploy_and_delete(http: httpx.Client) -> None:
    assert http.get("/-/routes").json() == {}

    @serve.deployment
    def a() -> str:
        return "a"

    def routes() -> object:
        answer = http.get("/-/routes")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    a.deploy()
    assert routes() == {"/a": "a"}
    a.options(name="b", route_prefix="/deep/b").deploy()
    assert routes() == {"/a": "a", "/deep/b": "b"}
    a.options(name="hidden", route_prefix=None).deploy()
    assert routes() == {"/a": "a", "/deep/b": "b"}
    a.delete()
    assert routes() == {"/deep/b": "b"}
    assert http.get("/a").status_code == 404


def test_an_unknown_path_is_404_and_points_at_the_route_table(http: httpx.Client) -> None:
    answer = http.get("/nowhere")

    assert answer.status_code == 404
    assert answer.text.startswith("Path '/nowhere' not found. Please ping http://")
    assert answer.text.endswith("/-/routes for route table.")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_arrives_and_may_carry_a_body(method: str, http: httpx.Client) -> None:
    @serve.deployment
    async def echo(request: Request) -> str:
        return f"{request.method} {(await request.body()).decode()}"

    echo.deploy()

    assert http.request(method, "/echo", content=b"body").text == f"{method} body"


def test_a_header_calls_another_public_method_unless_that_is_turned_off(http: httpx.Client) -> None:
    @serve.deployment
    class Methods:
        def __call__(self, request: Request) -> str:
            return "call"

        def other(self, request: Request) -> str:
            return "other"

    Methods.deploy()
    header = {"X-Serve-Call-Method": "other"}
    assert http.get("/Methods").text == "call"
    assert http.get("/Methods", headers=header).text == "other"
    assert http.get("/Methods", headers={"X-Serve-Call-Method": "missing"}).status_code == 404

    Methods.options(http_method_header=False).deploy()
    assert http.get("/Methods", headers=header).text == "call"


@pytest.mark.parametrize("prefix", ["/", "/redirect", "/deep/redirect"])
def test_redirects_built_from_root_path_arrive(prefix: str, http: httpx.Client) -> None:
    @serve.deployment(route_prefix=prefix)
    async def redirect(request: Request) -> Response | str:
        root = request.scope["root_path"]
        if request.url.path.rstrip("/") == root:
            return RedirectResponse(f"{root}/arrived")
        return "arrived"

    redirect.deploy()

    answer = http.get(prefix, follow_redirects=True)
    assert answer.text == "arrived"
    assert len(answer.history) == 1


def test_the_url_of_a_deployment_leads_to_it(qserve_instance: TestInstance) -> None:
    @serve.deployment
    def here() -> str:
        return "here"

    here.deploy()

    assert here.url == f"{qserve_instance.url}/here"
    assert httpx.get(str(here.url)).text == "here"
    assert here.options(route_prefix=None).url is None
