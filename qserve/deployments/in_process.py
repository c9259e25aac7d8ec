"""Deployments that run in the process that calls them, without Redis: for unit tests, and `_local_testing_mode`."""

import importlib
from contextlib import AbstractContextManager
from typing import Any, cast

from qserve.errors import ConfigurationError


def serving_here(asked_for: str) -> AbstractContextManager[Any]:
    """A block in which what this process deploys runs in it; gives the ASGI application that serves it over HTTP.

    Args:
        asked_for: What needs it, for the error.

    Raises:
        ConfigurationError: `qserve[workers]` is not installed.
    """
    try:
        serving = importlib.import_module("qserve_workers.local.local_serving")
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"{asked_for} needs the package {exc.name!r}, which is not installed: pip install 'qserve[workers]'"
        ) from exc
    return cast(AbstractContextManager[Any], serving.serving_here())
