"""The event stream of a page of the console: what has changed, and an end, so that rights are looked at again."""

from types import SimpleNamespace

import pytest

from qserve_gateway.console import live
from qserve_gateway.console.live import LiveStreams


async def test_a_stream_tells_changes_and_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((0.0, 1.0, 2.0, 3.0, 901.0))
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    monkeypatch.setattr(live, "_EVERY_S", 0.0)
    pages = iter(("one", "one", "two"))
    streams = LiveStreams()

    async def render() -> list[str]:
        return [str(part) async for part in streams.response(lambda: next(pages)).body_iterator]

    assert await render() == ["retry: 3000\n\n", "event: live\ndata: one\n\n", "event: live\ndata: two\n\n"]
    assert not streams.is_full
