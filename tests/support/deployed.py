"""What the tests of a whole instance deploy; imported by replicas.

Not decorated, because mypy does not follow class decorators.
"""

import asyncio
import os
import time
from pathlib import Path

from starlette.requests import Request

from qserve import serve


class PidCode:
    """Tells which process it is, and with what it was made."""

    def __init__(self, made_with: str = "") -> None:
        self.made_with = made_with
        self.config: object = None

    def reconfigure(self, config: object) -> None:
        if config == "bad":
            raise ValueError("bad user_config")
        self.config = config

    def __call__(self) -> int:
        return os.getpid()

    def describe(self) -> dict[str, object]:
        return {"pid": os.getpid(), "made_with": self.made_with, "config": self.config}


class OtherPidCode:
    """The same in other code."""

    def __call__(self) -> int:
        return -os.getpid()


class BrokenCode:
    """Never comes up."""

    def __init__(self) -> None:
        raise RuntimeError("no model to load")

    def __call__(self) -> None: ...


class SlowCode:
    """Takes its time."""

    def __call__(self, seconds: float = 0.3) -> str:
        time.sleep(seconds)
        return "slow"


class DeployerCode:
    """Deploys something from within a replica."""

    def __call__(self) -> str:
        serve.get_deployment("Pid").options(name="Deployed", route_prefix=None).deploy()
        return "deployed"


class LastWordsCode:
    """Says so when it goes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None: ...

    def __del__(self) -> None:
        with Path(self.path).open("a") as file:
            file.write("gone\n")


class GatedCode:
    """Notes each call, and answers it once a file is there."""

    def __init__(self, gate: str, ledger: str) -> None:
        self.gate = Path(gate)
        self.ledger = Path(ledger)

    async def __call__(self, request: Request) -> str:
        return await self.hold(request.query_params["n"])

    async def hold(self, number: str) -> str:
        with self.ledger.open("a") as file:
            file.write(f"{number}\n")
        while not self.gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return number


Pid = serve.deployment(name="Pid")(PidCode)
OtherPid = serve.deployment(name="OtherPid")(OtherPidCode)
Broken = serve.deployment(name="Broken")(BrokenCode)
Slow = serve.deployment(name="Slow")(SlowCode)
Deployer = serve.deployment(name="Deployer")(DeployerCode)
LastWords = serve.deployment(name="LastWords")(LastWordsCode)
