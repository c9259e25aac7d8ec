"""The clients of one process: on a cluster it has one for each shard that it speaks to, made when it first does."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from qserve.broker.lanes.lines import Lines
from qserve.settings import Settings, at_shard

if TYPE_CHECKING:
    from qserve.calls.client import Client


class ShardClients:
    """Finds the client for a deployment or a call. From any thread.

    Args:
        main: The client that the process has started, on whose event loop the others live.
        join: Makes a client for a shard, which is to begin on that loop.
    """

    def __init__(self, main: "Client", join: Callable[["Client", Settings, Lines], "Client"]) -> None:
        self._main = main
        self._join = join
        self._lines = Lines()
        self._keys = main.settings.keys
        self._by_shard = {self._keys.shard: main}
        self._by_name: dict[str, Client] = {}
        self._lock = threading.Lock()

    def of(self, deployment: str) -> "Client":
        """The client for calls of a deployment."""
        found = self._by_name.get(deployment)
        if found is None:
            found = self._by_name[deployment] = self._at(self._keys.of(deployment).shard)
        return found

    def of_call(self, call_id: str) -> "Client":
        """The client for a durable call that is known by its id."""
        return self._at(self._keys.of_call(call_id).shard)

    def all(self) -> "list[Client]":
        """All that there are now."""
        return list(self._by_shard.values())

    def _at(self, shard: int) -> "Client":
        found = self._by_shard.get(shard)
        if found is None:
            with self._lock:
                found = self._by_shard.get(shard)
                if found is None:
                    found = self._join(self._main, at_shard(self._main.settings, shard), self._lines)
                    self._by_shard[shard] = found
        return found
