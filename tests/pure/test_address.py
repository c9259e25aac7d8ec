"""What QSERVE_REDIS_URL may say, what it means, and what is told about one that makes no sense."""

import pytest

from qserve.broker.server.address import SENTINEL_PORT, Broker, mask, parse
from qserve.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("redis://", Broker()),
        ("redis://host", Broker("host")),
        ("redis://host/2", Broker("host", db=2)),
        ("redis://host:6380?db=3", Broker("host", 6380, db=3)),
        ("redis://[::1]:6380/1", Broker("::1", 6380, db=1)),
        ("redis://:p%40ss%2F@host", Broker("host", password="p@ss/")),
        ("redis://user:p%2525@host", Broker("host", username="user", password="p%25")),
        ("redis://user@host", Broker("host", username="user")),
        ("unix:///run/valkey.sock", Broker(path="/run/valkey.sock")),
        ("unix://user:pw@/run/valkey.sock?db=4", Broker(path="/run/valkey.sock", username="user", password="pw", db=4)),
        (
            "redis+sentinel://user:pw@a,b:1,[::2]:3/main/5?sentinel_username=su&sentinel_password=s%26p",
            Broker(
                username="user",
                password="pw",
                db=5,
                sentinels=[("a", 26379), ("b", 1), ("::2", 3)],
                service="main",
                sentinel_username="su",
                sentinel_password="s&p",
            ),
        ),
        ("redis+cluster://a,b:1", Broker(nodes=[("a", 6379), ("b", 1)], shards=16)),
        (
            "redis+cluster://user:pw@[::2]:3/?shards=64&slot=7",
            Broker(username="user", password="pw", nodes=[("::2", 3)], shards=64, slot=7),
        ),
    ],
)
def test_a_url_says_everything(url: str, broker: Broker) -> None:
    assert parse(url) == broker


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://:geheim@localhost", "it has to begin with one of redis://"),
        (":geheim@localhost", "it has to begin with one of redis://"),
        ("redis://user:geh/eim@localhost", "its port is not a number"),
        ("redis://:geheim@localhost:65536", "its port is too large a number"),
        ("redis://:geheim@localhost/3000000000", "its database is too large a number"),
        ("redis://:geheim@localhost/abc", "its database is not a number"),
        ("redis://:geheim@localhost?password=geheim", "option 'password' is not one of db"),
        ("redis://:geheim@localhost?ssl_cert_reqs=none", "option 'ssl_cert_reqs' is not one of db"),
        ("rediss://:geheim@localhost?ssl_cert_reqs=never", "ssl_cert_reqs is none of required, optional, none"),
        ("rediss://:geheim@localhost?ssl_check_hostname=no", "ssl_check_hostname is neither true nor false"),
        ("rediss://:geheim@localhost?ssl_ca_certs=/nowhere.pem", "ssl_ca_certs cannot be read: /nowhere.pem: No such"),
        ("rediss://:geheim@localhost?ssl_ca_certs=/dev/null", "its certificate files cannot be used"),
        ("unix://:geheim@", "it names no socket"),
        ("redis+cluster://:geheim@a,b/main", "a cluster has no databases and no services"),
        ("redis+cluster://:geheim@a?db=1", "option 'db' is not one of shards, slot"),
        ("redis+cluster://:geheim@a?shards=1", "its shards are not between 2 and 255"),
        ("redis+sentinel://:geheim@a,b", "the name of the service that the sentinels watch is missing"),
        ("redis+sentinel://:geheim@a:b/main?sentinel_password=geheim", "its port is not a number"),
    ],
)
def test_what_is_wrong_is_told_with_an_example_and_without_a_password(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url)
    text = str(caught.value)
    assert reason in text
    assert "redis://:PASSWORD@localhost:6379/0" in text
    assert "geh" not in text
    assert "eim" not in text


def test_nothing_that_describes_a_broker_shows_a_password() -> None:
    url = "rediss+sentinel://user:geheim@a,b/main?sentinel_password=geheim"
    broker = parse(url)
    assert broker.place == "the primary of 'main' (sentinels a:26379, b:26379)"
    assert mask(url) == "rediss+sentinel://***@a,b/main?sentinel_password=***"
    assert "geheim" not in f"{broker!r} {broker.place}"


def test_other_threads_never_find_a_broker_without_its_guides() -> None:
    """They would take its URL for that of one server, and connect to localhost."""
    broker = parse("redis+sentinel://one,two,three/reordered")
    seen: list[int] = []

    class Looking(str):
        def __eq__(self, other: object) -> bool:
            seen.append(len(broker.guides))  # what another thread would see that runs now
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    broker.prefer((Looking("three"), SENTINEL_PORT))
    assert set(seen) == {3}
    assert broker.guides[0] == ("three", SENTINEL_PORT)


def test_certificates_are_checked_unless_the_url_says_otherwise() -> None:
    tls = parse("rediss://host").tls
    assert tls is not None
    assert (tls.verify, tls.check_hostname) == ("required", True)
    trusting = parse("rediss://host?ssl_cert_reqs=none").tls
    assert trusting is not None
    assert (trusting.context.verify_mode.name, trusting.context.check_hostname) == ("CERT_NONE", False)
