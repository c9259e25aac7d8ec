"""User code whose module uses the event loop while it is imported."""

import asyncio

LOOP = asyncio.get_event_loop()
STARTED = asyncio.Event()


async def start() -> str:
    """Find the module complete."""
    STARTED.set()
    return LATER


TASK = asyncio.create_task(start())
LATER = "complete"


class UsesTasks:
    """A class that uses what its module has begun."""

    async def started(self) -> tuple[bool, bool, str]:
        await STARTED.wait()
        return asyncio.get_running_loop() is LOOP, TASK.get_loop() is LOOP, await TASK
