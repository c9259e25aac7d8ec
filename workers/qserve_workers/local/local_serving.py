"""Deployments in this process: started, made the instance of the process, and stopped."""

import contextlib
import secrets
from collections.abc import Iterator

from qserve.calls.process_client import using_client
from qserve.context import set_replica_context
from qserve.deployments.driver import THIS_PROCESS, ConnectedInstance
from qserve.settings import Settings
from qserve_workers.local.local_app import LocalApp
from qserve_workers.local.local_calls import LocalCalls
from qserve_workers.local.local_client import LocalClient
from qserve_workers.local.local_schedules import LocalSchedules
from qserve_workers.local.local_state import LocalState

_NOWHERE = "redis://127.0.0.1:1"
"""Settings want a URL; nothing connects to it."""


@contextlib.contextmanager
def serving_here() -> Iterator[LocalApp]:
    """A block in which what this process deploys runs in it; gives the ASGI application that serves it over HTTP."""
    settings = Settings(redis_url=_NOWHERE, secret=secrets.token_hex(16), out_of_line_bytes=2**62)
    client = LocalClient(settings)
    with using_client(client):
        instance = ConnectedInstance(settings, state := LocalState(client))
        instance.schedules = schedules = LocalSchedules(state, client.clock)
        with THIS_PROCESS.using(instance):
            try:
                yield LocalApp(client, state, LocalCalls(client, schedules))
            finally:
                instance.close()
                set_replica_context(None)
