"""The console of an instance that runs from a terminal: open to this machine, unless something else is set."""

import os
from collections.abc import Mapping
from typing import Final

from qserve.settings import LOOPBACK_HOSTS, Settings

CONSOLE_PORT: Final = 8265
"""Where the console is, if that port is free."""


def console_environment() -> Mapping[str, str]:
    """The variables that let the gateway have a console, as far as nobody has set them."""
    settings = Settings()
    if settings.admin_host not in LOOPBACK_HOSTS:
        return {}
    wanted = {"QSERVE_CONSOLE_OPEN": "1"} if "QSERVE_CONSOLE_OPEN" not in os.environ else {}
    return wanted if settings.admin_port is not None else {**wanted, "QSERVE_ADMIN_PORT": str(CONSOLE_PORT)}
