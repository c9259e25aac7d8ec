"""Keeps a gateway in step with the desired state, and tells deployers how far it has come."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from qserve.background import spawn
from qserve.broker.connection import Answer
from qserve.broker.instance.change_log import Change, Snapshot, connect_asyncio, follow, read_snapshot
from qserve.broker.instance.remembered_state import RememberedState
from qserve.broker.instance.reports import report_gateway, send_gateway_report, withdraw_gateway
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.stream_ids import order
from qserve.calls.client import Client
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.wire.spec import GatewayInfo

logger = logging.getLogger(__name__)

_ANNOUNCE_EVERY_S = 5.0
_RETRY_S = 0.2


class Follower:
    """Applies each change of the state and reports it at once: `deploy` waits until all live gateways have done so.

    Its id is the client's, whose inbox already says every second that this process lives.

    Args:
        client: Started by the caller, stopped by the caller after this.
        apply: Takes the whole desired state.
    """

    def __init__(self, client: Client, info: GatewayInfo, apply: Callable[[Snapshot], None]) -> None:
        self._client = client
        self._settings = client.settings
        self._info = info
        self._apply = apply
        self._redis = connect_asyncio(client.settings.redis_url)
        settings = client.settings
        self._remembered = RememberedState(settings.keys, client.signer, restores=settings.autorestore)

    async def start(self) -> None:
        """Apply the state as it is now, without reporting it.

        Raises:
            BrokerUnavailable, ConfigurationError: It cannot be read or used.
        """
        await self._catch_up()

    async def announce(self) -> None:
        """Be counted among the live gateways. Returns once Redis knows, or at once if Redis cannot be told now."""
        with contextlib.suppress(BrokerUnavailable, CommandRefused):
            await report_gateway(self._client.sender, self._settings.keys, self._info)

    async def run(self) -> None:
        """Stay counted and apply changes of the state, until cancelled."""
        announcing = spawn(self._keep_announcing())
        try:
            await self._follow()
        finally:
            announcing.cancel()

    def leave(self) -> None:
        """No longer be counted, so that no deploy waits for this gateway."""
        withdraw_gateway(self._client.sender, self._settings.keys, self._info.id, _log_refusal)

    async def stop(self) -> None:
        """Close the connection."""
        await self._redis.aclose()

    async def _follow(self) -> None:
        async for change in follow(self._settings.redis_url, self._settings.keys, self._info.applied):
            while self._is_news(change):
                try:
                    await self._catch_up(change)
                    self._tell()
                    break
                except BrokerUnavailable as exc:
                    logger.warning("cannot read the state, trying again: %s", exc)
                    await asyncio.sleep(_RETRY_S)
                except ConfigurationError as exc:
                    # Not reported as applied: whoever changed them waits and is told which gateway lags behind.
                    logger.error("HTTP options stay as they were: %s", exc)
                    break

    def _is_news(self, change: Change) -> bool:
        return change.kind == "resync" or order(change.log_id) > order(self._info.applied)

    async def _catch_up(self, change: Change | None = None) -> None:
        snapshot = await self._remembered.after(self._redis, [change]) if change is not None else None
        if snapshot is None:
            found = await read_snapshot(self._redis, self._settings.keys, self._client.signer)
            snapshot = await self._remembered.compare(self._redis, found)
        self._apply(snapshot)
        self._info = msgspec.structs.replace(self._info, applied=snapshot.log_id)

    async def _keep_announcing(self) -> None:
        # Again and again, because a Redis that restarted empty has forgotten us.
        while True:
            self._tell()
            await asyncio.sleep(_ANNOUNCE_EVERY_S)

    def _tell(self) -> None:
        send_gateway_report(self._client.sender, self._settings.keys, self._info, _log_refusal)


def _log_refusal(answer: Answer) -> None:
    if isinstance(answer, CommandRefused):  # a lost connection is told of where it is made again
        logger.warning("cannot announce this gateway: %s", answer)
