"""What the tests of a whole instance deploy; imported by replicas."""

import os
import time
from pathlib import Path

from qserve import serve


@serve.deployment
class Pid:
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


@serve.deployment
class OtherPid:
    """The same in other code."""

    def __call__(self) -> int:
        return -os.getpid()


@serve.deployment
class Broken:
    """Never comes up."""

    def __init__(self) -> None:
        raise RuntimeError("no model to load")

    def __call__(self) -> None: ...


@serve.deployment
class Slow:
    """Takes its time."""

    def __call__(self, seconds: float = 0.3) -> str:
        time.sleep(seconds)
        return "slow"


@serve.deployment
class Deployer:
    """Deploys something from within a replica."""

    def __call__(self) -> str:
        Pid.options(name="Deployed").deploy()
        return "deployed"


@serve.deployment
class LastWords:
    """Says so when it goes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None: ...

    def __del__(self) -> None:
        with Path(self.path).open("a") as file:
            file.write("gone\n")
