"""API keys as operators write them down, and which requests they open."""

from hashlib import sha256
from pathlib import Path

import pytest

from qserve.errors import ConfigurationError
from qserve.settings import Settings
from qserve_gateway.api_keys import load_api_keys
from qserve_gateway.respond import Refused

HASH = f"sha256:{sha256(b'third').hexdigest()}"


def status_of(keys: str, headers: dict[bytes, bytes], deployment: str = "") -> int:
    found = load_api_keys(Settings(api_keys=keys))
    assert found is not None
    try:
        rest = found.check([*headers.items()], headers, deployment)
    except Refused as refused:
        return refused.response.status
    assert rest == [(b"accept", b"*/*")]
    return 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({b"x-api-key": b"first"}, 200),
        ({b"authorization": b"bearer  second"}, 200),
        ({b"x-api-key": b"third"}, 200),
        ({b"x-api-key": b"fourth"}, 401),
        ({b"authorization": b"Basic second"}, 401),
        ({}, 401),
    ],
)
def test_a_key_is_one_of_those_in_the_setting_or_has_one_of_their_hashes(
    headers: dict[bytes, bytes], status: int
) -> None:
    assert status_of(f"first, second,{HASH}", {b"accept": b"*/*"} | headers) == status


def test_whoever_brings_none_is_told_how_to_bring_one() -> None:
    keys = load_api_keys(Settings(api_keys="first"))
    assert keys is not None
    with pytest.raises(Refused) as refused:
        keys.check([], {}, "")
    assert (b"www-authenticate", b"Bearer") in refused.value.response.headers


def test_a_key_of_the_file_may_open_some_deployments_only(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nall\nsome Echo, Sum\n")
    keys = load_api_keys(Settings(api_keys_file=str(file)))
    assert keys is not None
    for key, deployment in ((b"all", "Other"), (b"some", "Sum"), (b"some", "")):
        assert keys.check([], {b"x-api-key": key}, deployment) == []
    with pytest.raises(Refused) as refused:
        keys.check([], {b"x-api-key": b"some"}, "Other")
    assert refused.value.response.status == 403
    both = load_api_keys(Settings(api_keys="first", api_keys_file=str(file)))
    assert both is not None
    for key in (b"first", b"all"):
        assert both.check([], {b"x-api-key": key}, "Other") == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read"),
        (b"\xff\xfea", "cannot be read"),
        (b"# none\n", "there is none in"),
        (b"sha256:abc\n", "64 hex digits do not follow"),
        (b"sha256:xyz\n", "64 hex digits do not follow"),
    ],
)
def test_a_file_without_usable_keys_is_an_error(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=text):
        load_api_keys(Settings(api_keys_file=str(file)))


def test_without_configured_keys_all_may_call_all() -> None:
    assert load_api_keys(Settings()) is None
