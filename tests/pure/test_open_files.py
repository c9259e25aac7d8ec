"""A gateway accepts no more connections than it may open files."""

import resource

import pytest

from qserve_gateway.door.open_files import possible_connections

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "possible"),
    [
        (20_000, 20_000, None, 10_000),
        (UNLIMITED, UNLIMITED, None, 10_000),
        (1_024, UNLIMITED, 13_393, 10_000),
        (1_024, 524_288, 13_393, 10_000),
        (1_024, 4_096, 4_096, 3_028),
        (50, 50, 50, 1),
    ],
)
def test_the_limit_is_raised_as_far_as_it_may_be(
    soft: int,
    hard: int,
    raised_to: int | None,
    possible: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _which, pair: limits.append(pair))
    assert possible_connections(10_000) == possible
    assert limits == ([(raised_to, hard)] if raised_to is not None else [])
    assert ("accepts" in caplog.text) is (possible < 10_000)
