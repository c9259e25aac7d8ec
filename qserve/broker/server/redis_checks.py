"""Checks whether a Redis server can carry calls.

`qserve doctor` prints the findings; whoever starts a service refuses a server with a failure.

The judgements are plain functions over what INFO and CONFIG GET answered; only `check_server` talks to a server.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from qserve.broker.redis_errors import broker_of
from qserve.broker.server import redis_clients
from qserve.broker.server.address import SLOTS, Address, Broker, database_problem, host_and_port, tls_problem
from qserve.errors import BrokerUnavailable, ConfigurationError, QServeError

logger = logging.getLogger(__name__)

Level = Literal["ok", "warn", "fail"]
OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"

OLDEST_USABLE = (7, 0, 0)
"""Script flags (`#!lua flags=allow-oom`) and XAUTOCLAIM's third answer came with Redis 7.0."""

_CONFIG_READ = ("appendfsync", "tcp-keepalive", "timeout", "maxmemory-clients")
_SLOW_S = 0.05
_WHY_SLOW = "SLOWLOG GET and LATENCY DOCTOR on the server, and its host's load, say why"
_CLOCK_TOLERANCE_S = 1.0
_TIMEOUT_S = 2.0
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "")

# First patch release of a branch without the holes that a client able to run scripts (CVE-2025-49844 and its
# siblings) or merely to connect (CVE-2026-27623, Valkey 9.0) can use. Newer branches than these started fixed,
# branches that are missing never got the fix from upstream.
_FIXED_SINCE = {
    "Redis": {(7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2},
    "Valkey": {(7, 2): 11, (8, 0): 6, (8, 1): 4, (9, 0): 3},
}
# CVE-2026-23479: use after free when a blocked client is evicted; without client eviction it cannot be reached.
_CLIENT_EVICTION_HOLE = ((7, 2, 0), (8, 6, 2))


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at, in one or two words.
        level: "ok", "warn" or "fail"; a service does not start on "fail".
        text: What was found.
        advice: What to do about it, "" when all is well.
        retry: The failure may pass by itself (nothing listens yet, the data set is being loaded).
    """

    check: str
    level: Level
    text: str
    advice: str = ""
    retry: bool = False


def connect(url: str, timeout_s: float = _TIMEOUT_S) -> "Redis":
    """A client that gives up after `timeout_s`, never repeats a command, and looks at replicas as well.

    Raises:
        ConfigurationError: Not a Redis URL.
    """
    return redis_clients.client(url, timeout_s, any_role=True)


def check_server(redis: "Redis") -> list[Finding]:
    """Check everything that can be found out about a server, or about every primary of a cluster; the first finding
    says whether it answers at all."""
    broker = broker_of(redis)
    if broker.nodes:
        return list(check_cluster(broker))
    sentinels = list(check_sentinels(broker))
    if any(finding.level == FAIL for finding in sentinels):
        return sentinels
    first, *others = _check_one(redis, broker)
    if first.level != OK:
        return [*sentinels, first]
    return [first, *sentinels, *others]


def _check_one(redis: "Redis", broker: Broker) -> list[Finding]:
    refusals: list[ResponseError] = []
    try:
        info: Mapping[str, Any] = _if_allowed(redis.info, refusals) or {}
        before = time.time()
        now = _if_allowed(redis.time)
        after = time.time()
        config = _read_config(redis, info)
    except (RedisError, OSError) as exc:
        return [why_unreachable(exc, broker)]
    judged = judge(info, config) if info else _unjudged(refusals)
    clock = check_clock(now[0] + now[1] / 1e6 - (before + after) / 2) if now else ()
    took = f"the server took {(after - before) * 1000:.0f} ms for an answer; every call needs several"
    slow = [Finding("latency", WARN, took, _WHY_SLOW)] if after - before >= _SLOW_S else []
    name, version = server_version(info)
    answers = f"{name} {'.'.join(map(str, version))} answers at {broker.place}" if info else f"{broker.place} answers"
    return [
        Finding("reachable", OK, answers),
        *slow,
        *judged,
        *clock,
        *check_exposure(broker),
    ]


def check_cluster(broker: Broker) -> Iterator[Finding]:
    """Check every primary of a cluster, and whether the others go on while one is down."""
    failures: dict[Address, Exception] = {}
    found, slots = redis_clients.primaries_of_cluster(broker, failures)
    if not found:
        yield _why_no_node(broker, failures)
        return
    if slots == SLOTS:
        yield Finding("cluster", OK, f"{len(found)} servers have all {SLOTS} slots")
    else:
        text = f"{SLOTS - slots} slots are on no server: deployments in them cannot be called"
        yield Finding("cluster", WARN, text, "See CLUSTER INFO and CLUSTER SLOTS")
    for address in found:
        place = host_and_port(address)
        with redis_clients.client_at(broker, address, _TIMEOUT_S) as server:
            for each in _check_one(server, broker.at(address)):
                if each.level == FAIL and each.retry:
                    yield replace(each, level=WARN)  # the others are usable
                elif each.check == "reachable" or (each.level != OK and each.check != "mode"):
                    yield each if place in each.text else replace(each, text=f"{place}: {each.text}")
            full = _if_allowed(partial(server.config_get, "cluster-require-full-coverage"))
        if full and "yes" in full.values():
            text = f"{place}: a server that is down stops the whole cluster"
            yield Finding("cluster", WARN, text, "CONFIG SET cluster-require-full-coverage no, on every server")


def require_usable(redis: "Redis") -> None:
    """Refuse a server that calls would be lost on.

    Raises:
        BrokerUnavailable: It cannot be reached (now).
        ConfigurationError: It is too old, evicts keys, does not let us in, or cannot be written to.
    """
    broker = broker_of(redis)
    for finding in check_server(redis):
        if finding.level == FAIL:
            amid_failover = finding.check == "role" and bool(broker.sentinels)
            raise as_error(replace(finding, retry=finding.retry or amid_failover), broker.place)
        if finding.check == "permission":
            logger.warning("Redis at %s: %s.", broker.place, finding.text)


def require_usable_at(url: str) -> None:
    """Like `require_usable`, for the server of a URL."""
    with connect(url) as redis:
        require_usable(redis)


def as_error(finding: Finding, place: str) -> QServeError:
    """The exception that a failed check of the server at `place` becomes."""
    kind = BrokerUnavailable if finding.retry else ConfigurationError
    text = finding.text if place in finding.text else f"Redis at {place} cannot be used: {finding.text}"
    return kind(f"{text}. {finding.advice}.")


def judge(info: Mapping[str, Any], config: Mapping[str, str]) -> list[Finding]:
    """Judge what INFO and CONFIG GET say about a server; `config` is empty where CONFIG is not allowed."""
    return [
        *check_version(info),
        *check_known_holes(info, config),
        *check_role(info),
        *check_eviction(info),
        *check_memory(info),
        *check_durability(info, config),
        *check_connections(config),
    ]


def server_version(info: Mapping[str, Any]) -> tuple[str, tuple[int, int, int]]:
    """("Valkey", (9, 1, 0)) or ("Redis", (7, 0, 15)); Valkey also says which Redis it is compatible with."""
    valkey = info.get("valkey_version")
    return ("Valkey" if valkey else "Redis"), _numbers(str(valkey or info.get("redis_version", "0")))


def check_version(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that the version is new enough for the scripts."""
    name, version = server_version(info)
    text = f"{name} {'.'.join(map(str, version))}"
    if version < OLDEST_USABLE:
        yield Finding("version", FAIL, f"{text} is too old: qserve needs Redis >= 7.0 or Valkey", "Upgrade the server")
    else:
        yield Finding("version", OK, f"{text} is new enough")


def check_known_holes(info: Mapping[str, Any], config: Mapping[str, str]) -> Iterator[Finding]:
    """Warn of published remote holes of this very version; distributions patch without a new number."""
    name, version = server_version(info)
    fixed = _FIXED_SINCE[name]
    major, minor, patch = version
    branch = (major, minor)
    if branch <= max(fixed) and patch < fixed.get(branch, 1_000):
        wanted = ", ".join(f"{a}.{b}.{least}" for (a, b), least in sorted(fixed.items()))
        yield Finding(
            "security",
            WARN,
            "this version has published holes that a client can use (CVE-2025-49844 in Lua, and others)",
            f"Use {name} {wanted} or later of the same branch, or a build that your distribution has patched",
        )
    first, last = _CLIENT_EVICTION_HOLE
    if name == "Redis" and first <= version <= last and config.get("maxmemory-clients", "0") != "0":
        yield Finding(
            "security",
            WARN,
            "client eviction is on in a version where it can be used to run code (CVE-2026-23479)",
            "Upgrade to Redis 8.6.3 or later, or: CONFIG SET maxmemory-clients 0",
        )


def check_role(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that the server takes writes."""
    if info.get("role", "master") != "master":
        yield Finding("role", FAIL, "this server is a read-only replica", "Give the URL of its primary")
    if str(info.get("cluster_enabled", 0)) == "1":
        text = "cluster mode is on, and this URL means one of its servers: no redirect is followed"
        yield Finding("mode", WARN, text, "Write redis+cluster:// to use all of them")


def check_sentinels(broker: Broker) -> Iterator[Finding]:
    """Check that the sentinels answer and agree."""
    if not broker.sentinels:
        return
    problems: list[str] = []
    found = [host_and_port(address) for address in redis_clients.primaries(broker, problems)]
    asked, said = len(broker.sentinels), "; ".join(problems)
    if not found:
        knows_nothing = len(problems) == asked and all("does not know" in problem for problem in problems)
        yield Finding(
            "sentinels",
            FAIL,
            f"no sentinel tells where {broker.place} is: {said}",
            f"See whether they run, and whether {broker.service!r} is the name in their `sentinel monitor`",
            retry=not knows_nothing,
        )
    elif problems:
        text = f"{len(problems)} of {asked} sentinels are of no use: {said}"
        yield Finding("sentinels", WARN, text, "A failover needs the majority of them")
    elif len(found) > 1:
        text = f"the sentinels do not agree where the primary is: {', '.join(found)}"
        yield Finding("sentinels", WARN, text, "Look again when the failover is over")
    else:
        yield Finding("sentinels", OK, f"all {asked} sentinels know the primary: {found[0]}")


def check_eviction(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that the server evicts no keys: a queue is one key, and so is a reply."""
    policy = str(info.get("maxmemory_policy", ""))
    if policy == "noeviction":
        yield Finding("eviction", OK, "maxmemory-policy is noeviction")
    elif policy:
        yield Finding(
            "eviction",
            FAIL,
            f"maxmemory-policy is {policy}: when memory is full, the server would throw away queues and replies",
            "Set it with `CONFIG SET maxmemory-policy noeviction` and in the server's configuration file, "
            "or use another server than your cache",
        )
    else:
        yield Finding("eviction", WARN, "the server does not tell its maxmemory-policy", "Make sure it is noeviction")


def check_memory(info: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that there is memory left for calls."""
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if limit and used > 0.9 * limit:
        yield Finding(
            "memory",
            WARN,
            f"{used / limit:.0%} of maxmemory ({limit / 2**20:,.0f} MiB) are used; calls are refused at the limit",
            "Raise maxmemory, or find out what fills it with `redis-cli --bigkeys`",
        )


def check_durability(info: Mapping[str, Any], config: Mapping[str, str]) -> Iterator[Finding]:
    """Check what survives a restart of the server."""
    for status in ("aof_last_write_status", "rdb_last_bgsave_status"):
        if info.get(status, "ok") != "ok":
            yield Finding(
                "persistence",
                WARN,
                f"the last write to disk failed ({status}:{info[status]}); the server may refuse every call",
                "Look at its log and at the free disk space",
            )
    if str(info.get("aof_enabled", 0)) != "1":
        yield Finding(
            "persistence",
            WARN,
            "the append-only file is off: deployments and waiting calls are lost when the server restarts",
            "CONFIG SET appendonly yes, and in the server's configuration file",
        )
    else:
        yield Finding("persistence", OK, f"append-only file is on (fsync {config.get('appendfsync', 'unknown')})")


def check_connections(config: Mapping[str, str]) -> Iterator[Finding]:
    """Check that idle connections are kept and that dead ones are noticed."""
    if not config:
        yield Finding("settings", WARN, "CONFIG GET is not allowed here, so only INFO was looked at")
        return
    if config.get("timeout", "0") != "0":
        yield Finding(
            "connections",
            WARN,
            f"the server closes connections that are idle for {config['timeout']} s",
            "CONFIG SET timeout 0",
        )
    if config.get("tcp-keepalive", "300") == "0":
        yield Finding(
            "connections",
            WARN,
            "tcp-keepalive is off: connections of machines that vanished stay open",
            "CONFIG SET tcp-keepalive 60",
        )


def check_clock(offset_s: float) -> Iterator[Finding]:
    """Compare the clocks. Only ages that are shown depend on it: deadlines are never compared across clocks."""
    if abs(offset_s) > _CLOCK_TOLERANCE_S:
        side = "ahead of" if offset_s > 0 else "behind"
        yield Finding(
            "clock",
            WARN,
            f"the server's clock is {abs(offset_s):.1f} s {side} the one here; times shown will be off",
            "Run NTP (chrony, systemd-timesyncd) on both machines",
        )
    else:
        yield Finding("clock", OK, f"clocks agree within {_CLOCK_TOLERANCE_S:.0f} s")


def check_exposure(broker: Broker) -> Iterator[Finding]:
    """Check that not everybody can write to the queues, and so decide what replicas run."""
    if broker.path or (broker.host in _LOCAL_HOSTS and not broker.sentinels):
        return
    if not broker.password:
        advice = "Set requirepass (or an ACL user) and put it into the URL; set QSERVE_SECRET to sign calls"
        yield Finding("exposure", WARN, "the server is on the network and asks for no password", advice)


def why_unreachable(exc: Exception, broker: Broker) -> Finding:
    """Return the finding for a server that did not let us look."""
    place, has_password, text = broker.place, bool(broker.password), str(exc).rstrip(".")
    if isinstance(exc, AuthenticationError | AuthorizationError):
        return _wrong_password(place, text, has_password=has_password)
    for check, problem in (("tls", tls_problem(exc, place)), ("database", database_problem(exc, broker))):
        if problem:
            return Finding(check, FAIL, *problem)
    if isinstance(exc, BusyLoadingError):
        text = f"Redis at {place} is still loading its data"
        return Finding("reachable", FAIL, text, "Try again in a moment", retry=True)
    if isinstance(exc, InvalidResponse):
        return Finding("reachable", FAIL, f"What answers at {place} is not Redis ({text})", "Check host and port")
    if isinstance(exc, ConnectionError | TimeoutError | OSError):
        advice = "Is it running, and is the URL right? It is read from --redis-url or QSERVE_REDIS_URL"
        return Finding("reachable", FAIL, f"Redis cannot be reached at {place}: {text}", advice, retry=True)
    return Finding("reachable", FAIL, f"Redis at {place} refuses to be looked at: {text}", "See the server's log")


def _why_no_node(broker: Broker, failures: Mapping[Address, Exception]) -> Finding:
    said = "; ".join(f"node {host_and_port(address)}: {redis_clients.reason(exc)}" for address, exc in failures.items())
    text = f"no node of {broker.place} answers: {said}"
    if all("cluster support disabled" in str(exc) for exc in failures.values()):
        return Finding("cluster", FAIL, text, "Write redis:// for a server that is no cluster")
    for address, exc in failures.items():
        finding = why_unreachable(exc, broker.at(address))
        if not finding.retry:
            return finding
    return Finding("cluster", FAIL, text, "See whether they run", retry=True)


def _wrong_password(place: str, text: str, *, has_password: bool) -> Finding:
    if has_password:
        return Finding(
            "password",
            FAIL,
            f"Redis at {place} does not accept the user name and password of the URL ({text})",
            "Correct them in --redis-url or QSERVE_REDIS_URL; characters such as @ : / are written %40 %3A %2F",
        )
    return Finding(
        "password",
        FAIL,
        f"Redis at {place} wants a password and the URL has none",
        "Write it as redis://:PASSWORD@HOST:PORT/0, or redis://USER:PASSWORD@HOST:PORT/0",
    )


def _unjudged(refusals: Sequence[ResponseError]) -> Iterator[Finding]:
    forbidden, said = any(isinstance(exc, NoPermissionError) for exc in refusals), "; ".join(map(str, refusals))
    what = "the user of the URL may not ask for INFO" if forbidden else f"the server does not answer INFO ({said})"
    advice = "Look with another user, or allow it: +info" if forbidden else "Look on the server itself"
    text = f"{what}, so version, role, eviction and persistence were not looked at"
    yield Finding("permission", WARN, text, advice)


def _if_allowed(ask: Callable[[], Any], refusals: list[ResponseError] | None = None) -> Any:
    try:
        return ask()
    except ResponseError as exc:  # forbidden or renamed by whoever hosts it
        if database_problem(exc, Broker()):
            raise
        (refusals if refusals is not None else []).append(exc)
        return None


def _read_config(redis: "Redis", info: Mapping[str, Any]) -> dict[str, str]:
    if not info or server_version(info)[1] < OLDEST_USABLE:  # took one name at a time
        return {}
    try:
        answer = redis.config_get(*_CONFIG_READ)
    except ResponseError:  # forbidden or renamed by whoever hosts it
        return {}
    return {_text(key): _text(value) for key, value in answer.items()}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _numbers(version: str) -> tuple[int, int, int]:
    parts = [int(number) for number in re.findall(r"\d+", version)[:3]]
    major, minor, patch = (*parts, 0, 0, 0)[:3]
    return major, minor, patch
