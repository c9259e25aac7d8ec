"""Celery beat as what submits scheduled calls: when it looks again."""

from typing import Any

import pytest
from celery import Celery

from qserve.durable.schedules import Schedules
from qserve.errors import BrokerUnavailable
from qserve.settings import Settings
from qserve_workers.beat import Scheduler


@pytest.fixture
def scheduler() -> Scheduler:
    app: Any = Celery("test", set_as_current=False)
    app.settings = Settings(redis_url="redis://127.0.0.1:1", secret="0123456789abcdef0123456789abcdef")
    return Scheduler(app)


@pytest.mark.parametrize(("next_in_s", "pause_s"), [(3600.0, 1.0), (0.5, 0.502), (-7.0, 0.002)])
def test_it_looks_again_when_the_next_call_is_due_or_a_schedule_may_have_been_added(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, next_in_s: float, pause_s: float
) -> None:
    monkeypatch.setattr(Schedules, "fire_due", lambda *_: next_in_s)
    assert scheduler.tick() == pytest.approx(pause_s)


def test_it_goes_on_while_redis_is_away(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> float:
        raise BrokerUnavailable("Redis cannot be reached")

    monkeypatch.setattr(Schedules, "fire_due", away)
    assert scheduler.tick() == 1.0
    assert "Cannot look at the schedules: Redis cannot be reached. Next try in 1 s." in caplog.text
    assert "qserve instance" in scheduler.info
