"""Hooks of a caller and of a real replica: what the one says the other is told, however the call is made."""

import sys
from pathlib import Path

import pytest

from qserve import serve
from qserve.testing import instance
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

HOOKS = """
from contextvars import ContextVar
from qserve.hooks import ClientHook, ReplicaHook

tenant = ContextVar("tenant", default="nobody")
told = ContextVar("told", default="nothing")

class Says(ClientHook):
    def before(self, call):
        call.meta["tenant"] = tenant.get()

class IsTold(ReplicaHook):
    def before(self, call):
        told.set(f"{call.meta.get('tenant')} {call.kind} {call.durable} {call.attempt}")
"""


def test_what_a_caller_says_reaches_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooks_of_both_sides.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("QSERVE_HOOKS", "hooks_of_both_sides:Says, hooks_of_both_sides:IsTold")

    @serve.deployment
    class Told:
        async def plain(self) -> str:
            return str(sys.modules["hooks_of_both_sides"].told.get())

        async def again(self) -> str:
            if serve.get_replica_context().attempt == 1:
                raise ValueError("not at the first attempt")
            return await self.plain()

        async def parts(self):  # type: ignore[no-untyped-def]
            yield await self.plain()

    with instance():
        Told.deploy()
        handle = Told.get_handle()
        handle.plain.remote().result(patience(LIMIT_S))
        sys.modules["hooks_of_both_sides"].tenant.set("ä company")

        assert handle.plain.remote().result(patience(LIMIT_S)) == "ä company call False 1"
        assert list(handle.options(stream=True).parts.remote()) == ["ä company stream False 1"]
        durable = handle.options(durable=True, retries=1, backoff=0.0, delay=0.1)
        assert durable.again.remote().result(patience(LIMIT_S)) == "ä company call True 2"
