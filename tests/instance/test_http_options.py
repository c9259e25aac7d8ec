"""`http_options`: what is accepted, and that middlewares wrap everything."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve import serve
from qserve.deployments.loading import load_target
from qserve.errors import ConfigurationError
from qserve.serve import HTTPOptions, Location
from qserve.settings import Settings
from qserve.testing import instance
from qserve.wire.codec import Codec
from tests.support.deployed import Pid
from tests.support.slowness import patience


class Stamp:
    """Adds a header to every response."""

    def __init__(self, app: ASGIApp, text: str = "") -> None:
        self.app = app
        self.text = text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", self.text.encode())]
            await send(message)

        await self.app(scope, receive, stamped)


class TestOptions:
    def test_defaults(self) -> None:
        options = HTTPOptions()

        assert (options.host, options.port, options.middlewares) == ("127.0.0.1", 8000, [])
        head_only: str = "HeadOnly"
        assert options.location == head_only
        assert options.location is Location.HEAD_ONLY
        assert options.serves

    @pytest.mark.parametrize("given", [{"host": None}, {"location": None}, {"location": "NoServer"}])
    def test_three_ways_to_say_no_http(self, given: dict[str, str | None]) -> None:
        options = HTTPOptions(**given)  # type: ignore[arg-type]

        assert not options.serves
        assert options.location == "NoServer"

    @pytest.mark.parametrize("given", [{"hots": "x"}, {"port": -1}, {"location": "Everywhere"}, {"middlewares": [3]}])
    def test_what_is_not_known_is_refused(self, given: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"is not possible|There is no option"):
            serve.start(http_options=given)

    def test_timeouts_and_certificates_are_for_the_processes_that_are_started(self) -> None:
        options = HTTPOptions(request_timeout_s=5, keep_alive_timeout_s=7, ssl_certfile="a.pem", ssl_keyfile="b.pem")
        assert options.environment() == {"QSERVE_HTTP_TIMEOUT_S": "5.0", "QSERVE_HTTP_KEEP_ALIVE_S": "7.0"}
        assert options.gateway_arguments() == ("--ssl-certfile=a.pem", "--ssl-keyfile=b.pem")
        assert (HTTPOptions().environment(), HTTPOptions().gateway_arguments()) == ({}, ())

    def test_a_middleware_without_arguments_may_be_given_as_its_class(self) -> None:
        codec = Codec(allow_pickle=False, max_bytes=1000)

        (one,) = HTTPOptions(middlewares=[Stamp]).settings(codec).middlewares  # type: ignore[list-item]

        assert load_target(one.target) is Stamp

    def test_a_middleware_that_cannot_be_imported_elsewhere_needs_a_key(self) -> None:
        class Local(Stamp): ...

        options = HTTPOptions(middlewares=[Middleware(Local)])
        assert options.settings(Codec(allow_pickle=True, max_bytes=100_000)).middlewares[0].target.pickled
        with pytest.raises(ConfigurationError, match="QSERVE_SECRET"):
            options.settings(Codec(allow_pickle=False, max_bytes=100_000))


class TestServing:
    def test_middlewares_wrap_everything_the_first_outermost(self) -> None:
        cors = Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
        options = HTTPOptions(port=0, middlewares=[cors, Middleware(Stamp, text="here")], root_path="/api")
        with instance(options) as running:
            with urllib.request.urlopen(f"{running.url}/-/routes", timeout=patience(20)) as response:
                assert response.headers["x-stamp"] == "here"

            preflight = urllib.request.Request(f"{running.url}/", method="OPTIONS")
            preflight.add_header("Origin", "http://elsewhere")
            preflight.add_header("Access-Control-Request-Method", "GET")
            with urllib.request.urlopen(preflight, timeout=patience(20)) as response:
                assert response.status == 200
                assert response.headers["access-control-allow-origin"] == "*"
                assert response.headers["x-stamp"] is None

            assert Pid.url == f"{running.url}/api/Pid"


class TestRedisFromTheEnvironment:
    def test_start_runs_a_node_on_it_and_shutdown_leaves_it_empty(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("QSERVE_REDIS_URL", settings.redis_url)
        monkeypatch.setenv("QSERVE_SECRET", settings.secret)
        monkeypatch.setenv("QSERVE_NAMESPACE", "environment")
        handle = serve.run(Pid, http_options={"port": 0})
        try:
            assert handle.remote().result(patience(20)) > 0
            assert list(serve.list_deployments()) == ["Pid"]
        finally:
            serve.shutdown()

        assert serve.list_deployments() == {}
        assert serve.status() == {}
