"""`serve.run(..., _local_testing_mode=True)`, as Ray Serve has it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import qserve
from qserve import serve
from qserve.testing import local


@serve.deployment
class Prices:
    def __init__(self, cents: int = 30) -> None:
        self.cents = cents

    def of(self, fruit: str) -> tuple[int, int]:
        return self.cents * len(fruit), os.getpid()


@serve.deployment
class Shop:
    def __init__(self, prices: Any) -> None:
        self.prices = prices

    async def total(self, fruit: str) -> tuple[int, int]:
        return await self.prices.of.remote(fruit)  # type: ignore[no-any-return]


def test_applications_run_in_this_process_until_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))

    shop = serve.run(Shop.bind(Prices.bind()), _local_testing_mode=True)
    (other,) = serve.run_many([serve.RunTarget(Shop.bind(Prices.bind(5)), "other")], _local_testing_mode=True)

    assert shop.total.remote("fig").result(timeout_s=10) == (90, os.getpid())
    assert other.total.remote("fig").result(timeout_s=10) == (15, os.getpid())
    assert {*serve.status().applications} == {"default", "other"}
    with local(Prices):
        assert [*serve.list_deployments()] == ["Prices"]
    assert len(serve.list_deployments()) == 4

    serve.shutdown()
    with pytest.raises(qserve.NoInstanceError):
        serve.list_deployments()


def test_two_of_one_name_or_one_route_are_refused_before_any_is_deployed() -> None:
    same_name = [Shop.options(route_prefix=None), Shop.options(route_prefix="/shop")]
    same_route = [Shop.options(route_prefix="/"), Prices.options(name="Other", route_prefix="/")]
    with local(Prices):
        for several, text in (same_name, "are named 'Shop'"), (same_route, "'Other' cannot both have the route '/'"):
            with pytest.raises(ValueError, match=text):
                serve.run(several)
        with pytest.raises(ValueError, match=r"are named 'one\.Prices'"):
            serve.run_many([serve.RunTarget(Prices.bind(cents), "one", f"/{cents}") for cents in (1, 2)])
        assert [*serve.list_deployments()] == ["Prices"]


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qserve_workers.local.local_serving", None)
    with pytest.raises(qserve.ConfigurationError, match=r"not installed: pip install 'qserve\[workers\]'"):
        serve.run(Prices.bind(), _local_testing_mode=True)
