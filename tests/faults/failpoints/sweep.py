"""Plays rows of the failure table, several at a time: most of that is starting processes."""

import asyncio
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.faults.failpoints.rows import Row
from tests.faults.failpoints.stage import Stage

_AT_ONCE = 3


async def sweep(redis_url: str, rows: Iterable[Row]) -> list[Exception | None]:
    """What is wrong with each row, None where it holds."""
    at_once = asyncio.Semaphore(_AT_ONCE)
    return await asyncio.gather(*(_outcome(row, redis_url, at_once) for row in rows))


async def _outcome(row: Row, redis_url: str, at_once: asyncio.Semaphore) -> Exception | None:
    async with at_once:
        with tempfile.TemporaryDirectory(prefix="qs-") as folder:
            try:
                async with Stage(redis_url, Path(folder)) as stage:
                    await _play(row, stage)
            except Exception as exc:
                return exc
            return None


async def _play(row: Row, stage: Stage) -> None:
    try:
        await row.play(stage, row)
    except Exception as exc:
        exc.add_note(stage.logs())
        raise
