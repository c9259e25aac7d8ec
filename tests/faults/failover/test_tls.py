"""TLS with certificates that are checked, on every connection of every process; with sentinels, too."""

import contextlib
import datetime
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import redis
import trustme
from kombu.exceptions import OperationalError

from qserve.broker.connection import Connection
from qserve.broker.instance.change_log import connect_asyncio, read_snapshot
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.settings import Settings
from qserve.wire.messages import Signer
from qserve_workers.celery_app import App
from tests.faults.failover.conftest import APP
from tests.faults.failover.sentinels import DATA, LOGIN, PASSWORD, SENTINEL_LOGIN, SERVICE, Server, sentinel
from tests.support.servers import SECRET
from tests.support.serving import free_port, runtime_folder
from tests.support.shell import Running, Shell
from tests.support.slowness import patience
from tests.support.started import assert_control_works
from tests.support.tls_proxy import TlsProxy
from tests.support.waiting import wait_until


class Secured:
    """A server and a sentinel that are reached through TLS only, and a CA that vouches for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self._write("ca.pem", self._ca.cert_pem)
        self._write("other.pem", trustme.CA().cert_pem)
        self._write("client.pem", self._ca.issue_cert("client@example.org").private_key_and_cert_chain_pem)
        demanding = self._context("localhost")
        demanding.verify_mode = ssl.CERT_REQUIRED
        self._ca.configure_trust(demanding)
        self.server = Server(folder / "data", DATA)
        self.direct = TlsProxy(self._context("localhost"), self.server.port)
        self.demanding = TlsProxy(demanding, self.server.port)
        self.found = TlsProxy(self._context("127.0.0.1"), self.server.port, plain=True)
        self.sentinel = Server(folder / "sentinel", sentinel(self.found.port, quorum=1), "--sentinel")
        self.watching = TlsProxy(self._context("localhost"), self.sentinel.port)

    def url(self, host: str = "localhost", ca: str = "ca.pem", more: str = "") -> str:
        return f"rediss://{LOGIN}@{host}:{self.direct.port}/0?ssl_ca_certs={self._folder / ca}{more}"

    @property
    def demanding_url(self) -> str:
        return self.url().replace(str(self.direct.port), str(self.demanding.port))

    @property
    def certificate(self) -> str:
        return f"&ssl_certfile={self._folder / 'client.pem'}"

    @property
    def sentinel_url(self) -> str:
        options = f"{SENTINEL_LOGIN}&ssl_ca_certs={self._folder / 'ca.pem'}"
        return f"rediss+sentinel://{LOGIN}@localhost:{self.watching.port}/{SERVICE}?{options}"

    @contextlib.contextmanager
    def expired(self, since: datetime.datetime) -> Iterator[str]:
        """The URL of the server with a certificate that was valid until then."""
        with TlsProxy(self._context("localhost", since), self.server.port) as late:
            yield self.url().replace(str(self.direct.port), str(late.port))

    def _context(self, name: str, not_after: datetime.datetime | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name, not_after=not_after).configure_cert(context)
        return context

    def _write(self, name: str, blob: trustme.Blob) -> None:
        blob.write_to_path(self._folder / name)


@pytest.fixture(scope="module")
def secured() -> Iterator[Secured]:
    with tempfile.TemporaryDirectory(prefix="qs-") as folder, contextlib.ExitStack() as stack:
        secured = Secured(Path(folder))
        for server in (secured.server, secured.sentinel):
            server.start()
            stack.callback(server.kill)
        for proxy in (secured.direct, secured.demanding, secured.found, secured.watching):
            stack.enter_context(proxy)
        wait_until(lambda: secured.server.role() == "master" and secured.sentinel.accepts())
        yield secured


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime, {"QSERVE_SECRET": SECRET})
        shell.write("app.py", APP)
        yield shell


async def by_call_path(url: str) -> None:
    """As calls connect."""
    connection = await Connection.open(url)
    try:
        assert await connection.call("PING") == b"PONG"
    finally:
        connection.close()


async def by_driver(url: str) -> None:
    """As drivers, heartbeats and announcements connect."""
    with contextlib.closing(State(url, Keys("tls"), Signer(()))) as state:
        assert state.generation("nothing") == 0


async def by_follower(url: str) -> None:
    """As whoever follows the state connects."""
    async with connect_asyncio(url) as client:
        assert (await read_snapshot(client, Keys("tls"), Signer(()))).deployments == {}


async def by_celery(url: str) -> None:
    """As Celery connects."""
    with App(Settings(redis_url=url)).connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        connection.default_channel.client.ping()


WAYS: list[Callable[[str], Awaitable[None]]] = [by_call_path, by_driver, by_follower, by_celery]


@pytest.mark.parametrize("connect", WAYS)
async def test_the_right_authority_is_trusted(connect: Callable[[str], Awaitable[None]], secured: Secured) -> None:
    before = secured.direct.encrypted
    await connect(secured.url())
    assert secured.direct.encrypted > before


@pytest.mark.parametrize("connect", WAYS)
async def test_sentinels_and_primary_speak_tls(connect: Callable[[str], Awaitable[None]], secured: Secured) -> None:
    before = secured.watching.encrypted, secured.found.encrypted
    await connect(secured.sentinel_url)
    assert secured.watching.encrypted > before[0]
    assert secured.found.encrypted > before[1]


@pytest.mark.parametrize(
    ("host", "ca", "reason"), [("localhost", "other.pem", "trusted"), ("127.0.0.1", "ca.pem", "host")]
)
@pytest.mark.parametrize("connect", WAYS)
async def test_another_authority_and_another_host_are_refused(
    connect: Callable[[str], Awaitable[None]], secured: Secured, host: str, ca: str, reason: str
) -> None:
    before = secured.direct.encrypted
    with pytest.raises((ConfigurationError, OperationalError, redis.ConnectionError)) as caught:
        await connect(secured.url(host, ca))
    assert secured.direct.encrypted == before
    text = str(caught.value)
    if connect is by_celery:
        assert "CERTIFICATE_VERIFY_FAILED" in text
    elif reason == "host":
        assert f"the certificate of Redis at 127.0.0.1:{secured.direct.port} is for another host" in text
    else:
        assert f"the certificate of Redis at localhost:{secured.direct.port} is not trusted" in text
        assert "?ssl_ca_certs=FILE" in text


async def test_a_certificate_whose_time_is_over_is_not_one_of_an_unknown_authority(secured: Secured) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    with secured.expired(yesterday) as url:
        for connect in (by_call_path, by_driver):
            with pytest.raises(ConfigurationError, match=r"is not valid now: .*expired\. Renew it"):
                await connect(url)


@pytest.mark.parametrize("connect", WAYS)
async def test_checks_can_be_turned_off(connect: Callable[[str], Awaitable[None]], secured: Secured) -> None:
    await connect(secured.url("127.0.0.1", more="&ssl_check_hostname=false"))
    await connect(secured.url("127.0.0.1", "other.pem", "&ssl_cert_reqs=none"))


@pytest.mark.parametrize("connect", WAYS)
async def test_a_server_that_wants_a_certificate_is_shown_one(
    connect: Callable[[str], Awaitable[None]], secured: Secured
) -> None:
    with pytest.raises((ConfigurationError, BrokerUnavailable, OperationalError, redis.ConnectionError)):
        await connect(secured.demanding_url)
    await connect(secured.demanding_url + secured.certificate)


@pytest.mark.timeout(120)
def test_every_process_serves_over_tls_with_sentinels(shell: Shell, secured: Secured) -> None:
    port = free_port()
    shell.extra["QSERVE_REDIS_URL"] = secured.sentinel_url
    running = Running(shell, "run", "app", "--port", str(port))
    try:
        running.wait_for("Ctrl-C stops it")
        assert httpx.get(f"http://127.0.0.1:{port}/echo?value=9", timeout=patience(20)).text == "9"
        assert shell.run("call", "echo", "3").stdout.strip() == "3"
        assert_control_works(shell)
    finally:
        running.interrupt()
        assert running.end() in (0, 130), running.output
    assert PASSWORD not in running.output
    assert quote(PASSWORD, safe="") not in running.output


def test_commands_say_what_is_wrong_with_a_certificate(shell: Shell, secured: Secured) -> None:
    shell.extra["QSERVE_REDIS_URL"] = secured.url(ca="other.pem")
    examined = shell.run("doctor")
    assert examined.returncode == 1
    assert "FAIL  tls" in examined.stdout
    for command in (["qserve_gateway", "--port", "0"], ["qserve_workers.node"]):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=patience(40),
            check=False,
        )
        assert done.returncode == 1
        assert "is not trusted" in done.stderr
