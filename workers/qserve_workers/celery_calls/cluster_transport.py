"""Celery's transport where Redis is a cluster, which kombu does not know: its keys all lie in the home of the instance.

A slot may move, so each connection asks the cluster where it is, as all others of qserve do.
"""

from typing import Any, Final

from kombu.transport.redis import Channel, Transport

from qserve.broker.server.address import parse
from qserve.broker.server.redis_clients import SlotConnection, SlotTlsConnection

URL_OPTION: Final = "cluster_url"
"""The transport option that holds the URL of the home."""
TRANSPORT: Final = f"{__name__}:ClusterTransport"
"""The name by which Celery finds this transport."""


class _ClusterChannel(Channel):
    """A channel whose connections lead to the primary of one slot."""

    connection_class: Any = SlotConnection
    connection_class_ssl: Any = SlotTlsConnection

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = super()._connparams(asynchronous)  # type: ignore[no-untyped-call]
        return found | {"broker": parse(self.connection.client.transport_options[URL_OPTION])}


class ClusterTransport(Transport):
    """Redis as kombu has it, on a cluster."""

    Channel = _ClusterChannel
