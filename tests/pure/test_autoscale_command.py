"""`celery control autoscale`, and what Celery sees of the autoscaler."""

from types import SimpleNamespace
from typing import Any

import pytest

from qserve_workers.pool.autoscaler import Autoscaler


def autoscaler(*, is_scaled: bool = True, decided: int = 3) -> Any:
    scaled: list[int] = []
    keeper = SimpleNamespace(
        deployment="Echo",
        rollout=SimpleNamespace(is_scaled=is_scaled, wanted=2),
        scaler=SimpleNamespace(bounds=None),
        decide=lambda _now: decided,
        scale=scaled.append,
        scaled=scaled,
    )
    made = object.__new__(Autoscaler)
    made.pool = SimpleNamespace(keeper=keeper)
    made.max_concurrency, made.min_concurrency = 4, 1
    return made


def test_other_bounds_take_effect_at_once() -> None:
    it = autoscaler()
    assert it.update(max=5) == (5, 1)
    assert it.update(min=2) == (5, 2)
    assert it.pool.keeper.scaler.bounds == (2, 5)
    assert it.pool.keeper.scaled == [3, 3]
    assert it.info() == {"max": 5, "min": 2, "current": 2}


def test_nothing_happens_before_anything_was_measured() -> None:
    it = autoscaler(decided=0)
    it.maybe_scale()
    assert it.pool.keeper.scaled == []


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    for most, fewest in ((2, 3), (2, 0), (0, 0)):
        refused = f"autoscale {most} {fewest} is refused: MIN has to be at least 1, and no more than MAX"
        with pytest.raises(ValueError, match=refused):
            autoscaler().update(most, fewest)
    with pytest.raises(ValueError, match="deploy it with autoscaling_config="):
        autoscaler(is_scaled=False).update(2, 1)
