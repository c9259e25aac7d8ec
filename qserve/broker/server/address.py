"""Which Redis, and how it is reached: what QSERVE_REDIS_URL says, read in one place for everything that connects."""

import binascii
import functools
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast
from urllib.parse import parse_qsl, unquote

from qserve.errors import ConfigurationError

Address = tuple[str, int]
Verify = Literal["required", "optional", "none"]

PORT: Final = 6379
SENTINEL_PORT: Final = 26379
EXAMPLES: Final = (
    "redis://:PASSWORD@localhost:6379/0, rediss://USER:PASSWORD@host:6379/0?ssl_ca_certs=/etc/ca.pem, "
    "unix:///run/valkey.sock, redis+sentinel://host1,host2,host3/SERVICE or redis+cluster://host1,host2,host3"
)
SLOTS: Final = 16384
"""Of a cluster, each of which one of its primaries holds."""
SHARDS: Final = 16
"""Over how many slots of a cluster an instance spreads its deployments, unless the URL says otherwise."""
_MOST_SHARDS: Final = 255

_LARGEST_PORT: Final = 65535
_DIGITS: Final = 9
_NO_DATABASE: Final = ("DB index is out of range", "SELECT is not allowed in cluster mode")
"""How a server begins that does not have the database of a URL."""

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = (*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_VERIFY_MODES = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
_OUT_OF_TIME = (9, 10)
"""OpenSSL's codes for certificates that are not valid yet, or not any more."""
_CLUSTER_OPTIONS = ("shards", "slot")
_SCHEMES = {
    # whether TLS is spoken, and who is asked where the primary is
    "redis": (False, ""),
    "rediss": (True, ""),
    "unix": (False, ""),
    "redis+sentinel": (False, "sentinels"),
    "rediss+sentinel": (True, "sentinels"),
    "redis+cluster": (False, "nodes"),
    "rediss+cluster": (True, "nodes"),
}


@dataclass(frozen=True)
class Tls:
    """How the server proves its identity, and how we prove ours.

    Attributes:
        ca_certs: File of authorities that are trusted besides the system's.
        certfile, keyfile: The certificate and key that we show.
        verify: Whether the server has to show a certificate of an authority we trust.
        check_hostname: Whether it has to be for the host we connect to.
    """

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: Verify = "required"
    check_hostname: bool = True

    @functools.cached_property
    def context(self) -> ssl.SSLContext:
        """The TLS context for asyncio; redis-py makes an equal one from `options`."""
        context = ssl.create_default_context()
        context.check_hostname = self.check_hostname
        context.verify_mode = _VERIFY_MODES[self.verify]
        if self.ca_certs:
            context.load_verify_locations(self.ca_certs)
        if self.certfile:
            context.load_cert_chain(self.certfile, self.keyfile)
        return context

    @property
    def options(self) -> dict[str, Any]:
        """The same for redis-py; every option is given, because its defaults have changed over time."""
        return {
            "ssl_ca_certs": self.ca_certs,
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_cert_reqs": self.verify,
            "ssl_check_hostname": self.check_hostname,
        }


@dataclass(frozen=True)
class Broker:
    """The parts of a Redis URL.

    Attributes:
        path: The path of its socket; host and port then mean nothing.
        sentinels: The sentinels that know where the primary of `service` is; host and port then mean nothing, either.
            The one that answered last comes first.
        nodes: Nodes of the cluster, which know where the primary of `slot` is, in the same way.
        shards: Over how many slots an instance on this cluster is spread; 1 where there is no cluster.
        slot: The slot whose primary is meant; any primary of the cluster if it is negative.
    """

    host: str = "localhost"
    port: int = PORT
    path: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: Tls | None = None
    sentinels: list[Address] = field(default_factory=list)
    service: str = ""
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)
    nodes: list[Address] = field(default_factory=list)
    shards: int = 1
    slot: int = -1

    @property
    def place(self) -> str:
        """Where the server is, as messages name it; it holds no password."""
        if self.nodes:
            known_to = ", ".join(map(host_and_port, sorted(self.nodes)))
            return f"the primary of slot {self.slot} (cluster {known_to})" if self.slot >= 0 else f"cluster {known_to}"
        if self.sentinels:
            known_to = ", ".join(map(host_and_port, sorted(self.sentinels)))
            return f"the primary of {self.service!r} (sentinels {known_to})"
        return self.path or host_and_port((self.host, self.port))

    @property
    def guides(self) -> list[Address]:
        """Whom to ask where the primary is; nobody where the address is known."""
        return self.nodes or self.sentinels

    def at(self, address: Address) -> "Broker":
        """The one server at an address that a guide gave."""
        return replace(self, host=address[0], port=address[1], sentinels=[], nodes=[], service="")

    def guide(self, address: Address) -> "Broker":
        """One of the guides, as a server to connect to."""
        if self.nodes:
            return self.at(address)
        return replace(self.at(address), username=self.sentinel_username, password=self.sentinel_password, db=0)

    def of_slot(self, slot: int) -> "Broker":
        """The primary of a slot; what is learned of the cluster's nodes is shared."""
        return replace(self, slot=slot)

    def prefer(self, guide: Address) -> None:
        """Ask this guide first from now on."""
        guides = self.guides
        if guides[0] != guide:
            # Not `sort`, during which other threads find the list empty, as that of a URL without guides.
            guides[:] = sorted(guides, key=lambda each: each != guide)

    def learn(self, nodes: Iterable[Address]) -> None:
        """Ask these nodes of the cluster, too, when those of the URL have gone."""
        self.nodes.extend(each for each in dict.fromkeys(nodes) if each not in self.nodes)


@functools.cache
def parse(url: str) -> Broker:
    """Parse a URL; the same URL gives the same object each time.

    Raises:
        ConfigurationError: It cannot be understood, or names files that cannot be read.
    """
    try:
        return _parse(url)
    except ValueError as exc:
        raise ConfigurationError(
            f"{mask(url)!r} is not a Redis URL: {exc}. Examples: {EXAMPLES}. In user names and passwords, characters "
            "such as @ : / ? # % are written %40 %3A %2F %3F %23 %25."
        ) from None  # the cause would show the password


def mask(url: str) -> str:
    """Return a URL without its passwords, even if it is not well-formed."""
    url = re.sub(r"^([a-z+]+://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def slot_of(tag: str) -> int:
    """The slot of a cluster in which keys with a hash tag lie."""
    return binascii.crc_hqx(tag.encode(), 0) % SLOTS  # the very CRC16 that Redis uses


def at_slot(url: str, slot: int) -> str:
    """The URL of the primary of a slot, from that of a cluster."""
    return f"{url}{'&' if '?' in url else '?'}slot={slot}"


def host_and_port(address: Address) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tls_problem(error: BaseException, place: str) -> tuple[str, str] | None:
    """Why TLS with a server failed, and what to do about it; None for an error that TLS is not behind."""
    exc: BaseException | None = error
    while exc is not None and not isinstance(exc, ssl.SSLError):
        exc = exc.__cause__ or exc.__context__
    if exc is None:
        return None
    if not isinstance(exc, ssl.SSLCertVerificationError):
        return (
            f"TLS with Redis at {place} failed ({exc.reason or exc})",
            "Write redis:// instead of rediss:// if it does not speak TLS, and add ?ssl_certfile=FILE&ssl_keyfile=FILE "
            "if it wants a certificate",
        )
    reason = exc.verify_message.rstrip(".")
    if "mismatch" in reason:
        text = f"the certificate of Redis at {place} is for another host: {reason}"
        return text, "Name the server in the URL as its certificate does"
    if exc.verify_code in _OUT_OF_TIME:
        text = f"the certificate of Redis at {place} is not valid now: {reason}"
        return text, "Renew it, or set the clock of this machine if that is wrong"
    text = f"the certificate of Redis at {place} is not trusted: {reason}"
    return text, "Name the file of its authority in the URL: ?ssl_ca_certs=FILE"


def database_problem(error: BaseException, broker: Broker) -> tuple[str, str] | None:
    """What is wrong with the database of a URL, and what to do about it; None for an error of another kind."""
    if not str(error).startswith(_NO_DATABASE):
        return None
    said = str(error).rstrip(".")
    return (
        f"Redis at {broker.place} has no database {broker.db}, which the URL names ({said})",
        "Name one that it has in --redis-url or QSERVE_REDIS_URL; /0 is always there",
    )


def _parse(url: str) -> Broker:
    # By hand: urlsplit wants one host, and its errors show parts of passwords.
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in _SCHEMES:
        raise ValueError(f"it has to begin with one of {', '.join(f'{each}://' for each in _SCHEMES)}")
    has_tls, guides = _SCHEMES[scheme]
    location, _, query = rest.partition("?")
    server, slash, path = location.partition("/")
    user, _, hosts = server.rpartition("@")
    username, _, password = user.partition(":")
    own = {"sentinels": (*_SENTINEL_OPTIONS, "db"), "nodes": _CLUSTER_OPTIONS, "": ("db",)}[guides]
    options = _options(query, (*_TLS_OPTIONS * has_tls, *own))
    common: dict[str, Any] = {
        "username": unquote(username),
        "password": unquote(password),
        "tls": _tls(options) if has_tls else None,
    }
    if scheme == "unix":
        if not path:
            raise ValueError("it names no socket")
        return Broker(path=unquote(slash + path), db=_number(options.get("db"), "database"), **common)
    if guides == "nodes":
        return _cluster(hosts, path, options, common)
    if guides:
        service, _, path = path.partition("/")
        if not service:
            raise ValueError("the name of the service that the sentinels watch is missing after the hosts")
        common["service"] = unquote(service)
        common["sentinels"] = [_address(each, SENTINEL_PORT) for each in hosts.split(",")]
        common |= {name: options[name] for name in _SENTINEL_OPTIONS if name in options}
    else:
        common["host"], common["port"] = _address(hosts, PORT)
    return Broker(db=_number(options.get("db", path), "database"), **common)


def _cluster(hosts: str, path: str, options: dict[str, str], common: dict[str, Any]) -> Broker:
    if path not in ("", "0"):
        raise ValueError("a cluster has no databases and no services: nothing may follow its hosts")
    shards = _number(options.get("shards"), "number of shards", SHARDS)
    if not 1 < shards <= _MOST_SHARDS:
        raise ValueError(f"its shards are not between 2 and {_MOST_SHARDS}")
    nodes = [_address(each, PORT) for each in hosts.split(",")]
    return Broker(nodes=nodes, shards=shards, slot=_number(options.get("slot"), "slot", -1), **common)


def _options(query: str, known: tuple[str, ...]) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is not one of {', '.join(known)}, which this kind of URL has")
    return options


def _address(text: str, port: int) -> Address:
    matched = re.fullmatch(r"\[(?P<v6>[^\]]+)\](:(?P<p6>.*))?|(?P<host>[^:\[\]]*)(:(?P<port>.*))?", text)
    if matched is None:
        raise ValueError("its host cannot be read")
    host = matched["v6"] or unquote(matched["host"] or "") or "localhost"
    return host, _number(matched["p6"] or matched["port"], "port", default=port)


def _number(text: str | None, what: str, default: int = 0) -> int:
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"its {what} is not a number")  # and may be a part of a password
    if len(text) > _DIGITS or (what == "port" and int(text) > _LARGEST_PORT):
        raise ValueError(f"its {what} is too large a number")
    return int(text)


def _tls(options: dict[str, str]) -> Tls:
    for name in _TLS_FILES:
        if name in options:
            try:
                Path(options[name]).read_bytes()
            except OSError as exc:
                raise ValueError(f"{name} cannot be read: {options[name]}: {exc.strerror}") from exc
    verify = options.get("ssl_cert_reqs", "required")
    if verify not in _VERIFY_MODES:
        raise ValueError(f"ssl_cert_reqs is none of {', '.join(_VERIFY_MODES)}")
    checks = options.get("ssl_check_hostname", "true").lower()
    if checks not in ("true", "false"):
        raise ValueError("ssl_check_hostname is neither true nor false")
    tls = Tls(
        ca_certs=options.get("ssl_ca_certs"),
        certfile=options.get("ssl_certfile"),
        keyfile=options.get("ssl_keyfile"),
        verify=cast("Verify", verify),
        check_hostname=checks == "true" and verify != "none",
    )
    try:
        tls.context  # noqa: B018 a bad file is told now, not at the first call
    except (ssl.SSLError, OSError) as exc:
        raise ValueError(f"its certificate files cannot be used: {exc}") from exc
    return tls
