"""API keys: off unless configured; then nobody comes in without one."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from qserve.testing import TestInstance
from tests.instance.front_door.cases import handshake
from tests.support.gateways import Gateway, gateway
from tests.support.raw_http import statuses
from tests.support.slowness import patience


@pytest.fixture(scope="module")
def locked(impatient: TestInstance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    hashed = sha256(b"hashed").hexdigest()
    file.write_text(f"# who\n\nplain\nsha256:{hashed}   slow, zip\n")
    with gateway(impatient.settings, QSERVE_API_KEYS="first,second", QSERVE_API_KEYS_FILE=file) as running:
        yield running


def status_of(locked: Gateway, path: str, **headers: str) -> int:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(locked.ready["url"] + path, headers=sent, timeout=patience(10)).status_code


@pytest.mark.parametrize("key", ["first", "second", "plain"])
def test_a_key_opens_all_deployments_in_either_header(locked: Gateway, key: str) -> None:
    assert status_of(locked, "/a", X_API_Key=key) == 200
    assert status_of(locked, "/slow", Authorization=f"Bearer {key}") == 200
    assert status_of(locked, "/-/routes", Authorization=f"bearer {key}") == 200


@pytest.mark.parametrize("path", ["/a", "/slow", "/-/routes", "/-/none"])
def test_without_a_known_key_there_is_nothing(locked: Gateway, path: str) -> None:
    assert status_of(locked, path) == 401
    for key in ("", "firs", "firstt", "FIRST", "first,second", sha256(b"hashed").hexdigest(), "x" * 5000):
        assert status_of(locked, path, X_API_Key=key) == 401
    assert status_of(locked, path, Authorization="Basic first") == 401
    assert status_of(locked, path, X_API_Key="wrong", Authorization="Bearer first") == 401


def test_a_key_may_open_some_deployments_only(locked: Gateway) -> None:
    assert status_of(locked, "/slow", X_API_Key="hashed") == 200
    assert status_of(locked, "/a", X_API_Key="hashed") == 403


def test_health_is_open(locked: Gateway) -> None:
    assert status_of(locked, "/-/healthz") == 200


def test_the_deployment_does_not_see_the_key(locked: Gateway) -> None:
    headers = {"X-API-Key": "first", "Authorization": "Basic the-apps-own"}
    told = httpx.get(locked.ready["url"] + "/a", headers=headers).json()
    names = dict(told["headers"])
    assert "x-api-key" not in names
    assert names["authorization"] == "Basic the-apps-own"


def test_websockets_need_one_too(locked: Gateway) -> None:
    with locked.address.connect() as connection:
        connection.sendall(handshake())
        assert statuses(connection.recv(65536)) == [401]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_come_from_windows(impatient: TestInstance, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "keys").write_bytes("first\r\nsecond\tslow\r\n".encode(encoding))
    with gateway(impatient.settings, QSERVE_API_KEYS_FILE=tmp_path / "keys") as running:
        assert status_of(running, "/a", X_API_Key="first") == 200
        assert status_of(running, "/slow", X_API_Key="second") == 200
        assert status_of(running, "/a", X_API_Key="second") == 403


@pytest.mark.parametrize("text", ["", "# none\n", "sha256:abc\n", "sha256:" + "g" * 64])
def test_a_file_without_a_usable_key_opens_nothing(impatient: TestInstance, tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with gateway(impatient.settings, QSERVE_API_KEYS_FILE=tmp_path / "keys") as failed:
        assert failed.process.wait(patience(10)) == 1
