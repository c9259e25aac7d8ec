"""What is deployed in an instance whose processes have Redis users of their own."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from qserve import serve


@serve.deployment(name="Echo", num_replicas=2)
class Echo:
    """Answers with what it is given."""

    async def __call__(self, value: Any = None) -> Any:
        if isinstance(value, Request):
            if value.url.path.endswith("/stream"):
                return StreamingResponse(iter([b"x" * 1000] * 100))
            return len(await value.body())
        return value

    def count(self, number: int) -> Iterator[int]:
        """The numbers below one."""
        yield from range(number)

    def slow(self, seconds: float) -> str:
        """How far it has come, then an answer."""
        serve.get_replica_context().report_progress({"percent": 50})
        return f"slept {seconds}"

    async def wait(self, seconds: float) -> None:
        """Lets time pass."""
        await asyncio.sleep(seconds)

    def fail(self) -> None:
        """Raises."""
        raise ValueError("no good")

    def die(self) -> None:
        """Takes its replica with it."""
        os._exit(1)

    def pid(self) -> int:
        """Of its replica."""
        return os.getpid()

    def _private(self) -> str:
        return "told"


Echo.options(user_config=None).deploy()
