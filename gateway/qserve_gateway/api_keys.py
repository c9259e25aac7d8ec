"""API keys: which clients may call which deployments. Without configured keys, all may call all."""

import hmac
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from qserve.errors import ConfigurationError
from qserve.settings import Settings
from qserve_gateway.headers import Headers
from qserve_gateway.respond import Refused, text_response

_HASHED = "sha256:"


class ApiKey(NamedTuple):
    """The SHA-256 of a key, and the deployments that it opens; None for all."""

    digest: bytes
    deployments: frozenset[str] | None


class ApiKeys:
    """All keys that a gateway knows."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)

    def check(self, headers: Headers, named: Mapping[bytes, bytes], deployment: str) -> Headers:
        """Check the key of a request.

        Args:
            headers, named: The request's headers, as a list and by their names.
            deployment: The deployment it goes to, "" for a page of the gateway's own.

        Returns:
            The headers without the key, which is no business of the deployment.

        Raises:
            Refused: There is no key, or it is not known (401), or it does not open this deployment (403).
        """
        carrier, presented = _presented(named)
        if not presented:
            raise _refused(401, "an API key is needed: `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        digest = sha256(presented).digest()
        found = None
        for key in self._keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise _refused(401, "this API key is not known")
        if deployment and found.deployments is not None and deployment not in found.deployments:
            raise _refused(403, "this API key does not open this deployment")
        return [pair for pair in headers if pair[0] != carrier]


def _refused(status: int, reason: str) -> Refused:
    challenge = ((b"www-authenticate", b"Bearer"),) if status == 401 else ()
    return Refused(text_response(status, f"Refused: {reason}.", *challenge))


def _presented(named: Mapping[bytes, bytes]) -> tuple[bytes, bytes]:
    key = named.get(b"x-api-key")
    if key is not None:
        return b"x-api-key", key
    scheme, _, key = named.get(b"authorization", b"").partition(b" ")
    return b"authorization", key.strip() if scheme.lower() == b"bearer" else b""


def load_api_keys(settings: Settings) -> ApiKeys | None:
    """Read the keys of `QSERVE_API_KEYS` and of the file `QSERVE_API_KEYS_FILE`; None where neither is set.

    A line of the file, and each key between commas, is the key or `sha256:` and the hex digest of it; in the file the
    names of the deployments it opens may follow, separated by commas.

    Raises:
        ConfigurationError: The file cannot be read, or there is no key in it.
    """
    if not settings.api_keys and not settings.api_keys_file:
        return None
    lines = settings.api_keys.split(",")
    if settings.api_keys_file:
        try:
            lines += _text_of(Path(settings.api_keys_file).read_bytes()).splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"QSERVE_API_KEYS_FILE {settings.api_keys_file} cannot be read: {exc}") from exc
    keys = [_parse(line) for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not keys:
        raise ConfigurationError("API keys are configured, but there is none in QSERVE_API_KEYS or its file.")
    return ApiKeys(keys)


def _text_of(content: bytes) -> str:
    """Text as editors of any system write it: Windows' put a byte order mark first, and may choose UTF-16."""
    return content.decode("utf-16" if content[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")


def _parse(line: str) -> ApiKey:
    key, *rest = line.split(maxsplit=1)
    deployments = frozenset(name.strip() for names in rest for name in names.split(",") if name.strip()) or None
    if not key.startswith(_HASHED):
        return ApiKey(sha256(key.encode()).digest(), deployments)
    try:
        digest = bytes.fromhex(key.removeprefix(_HASHED))
    except ValueError:
        digest = b""
    if len(digest) != sha256().digest_size:
        raise ConfigurationError("An API key begins with `sha256:`, but 64 hex digits do not follow.")
    return ApiKey(digest, deployments)
