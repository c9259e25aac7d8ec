"""The event stream of a page of the console: what has changed, and an end, so that rights are looked at again."""

import itertools
from types import SimpleNamespace

import pytest

from qserve_gateway.console import live
from qserve_gateway.console.live import LiveStreams


async def test_a_stream_tells_changes_and_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = itertools.chain(range(0, 18, 2), itertools.repeat(901))
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    monkeypatch.setattr(live, "_EVERY_S", 0.0)
    pages = iter(("one", "one", "two"))
    streams = LiveStreams()

    async def render() -> list[str]:
        return [str(part) async for part in streams.response("page", lambda: next(pages)).body_iterator]

    assert await render() == ["retry: 3000\n\n", "event: live\ndata: one\n\n", "event: live\ndata: two\n\n"]
    assert not streams.is_full


async def test_what_many_look_at_is_rendered_once() -> None:
    rendered: list[str] = []

    def render() -> str:
        rendered.append("")
        return "shown"

    streams = LiveStreams()
    open_ones = [streams._events(page, render) for page in ("a", "a", "a", "b")]
    for stream in open_ones:
        assert [await anext(stream), await anext(stream)][1] == "event: live\ndata: shown\n\n"
    assert len(rendered) == 2
    for stream in open_ones:
        await stream.aclose()
    assert streams._parts == {}
