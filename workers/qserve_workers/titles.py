"""What `ps` and `top` show for processes that were forked, and would all show the same command line."""

import os

from setproctitle import getproctitle, setproctitle

KEEPS_ENVIRONMENT = "SPT_NOENV"
"""Tells setproctitle to write over the command line only: /proc/PID/environ stays what it is."""


def set_title(title: str) -> None:
    """Set the title of this process; what the command line that it was started with has no room for is cut off."""
    os.environ[KEEPS_ENVIRONMENT] = "1"
    setproctitle(title)
    del os.environ[KEEPS_ENVIRONMENT]


def find_title() -> None:
    """Let the title be found now, beside the first environment, because this process will be given another one."""
    os.environ[KEEPS_ENVIRONMENT] = "1"
    getproctitle()
    del os.environ[KEEPS_ENVIRONMENT]
