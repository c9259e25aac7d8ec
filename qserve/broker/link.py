"""A pair of connections to Redis, one to send on and one to wait on, which is made anew when it is lost."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from qserve.background import CHANCE, end, spawn, until_next
from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.lanes.lines import Lines
from qserve.broker.redis_errors import CommandRefused, refused
from qserve.errors import BrokerUnavailable, ConfigurationError, QServeError

logger = logging.getLogger(__name__)

BLOCK_MS = 1000
"""How long a blocking read waits; short, so that no half-open connection is believed in for long."""
CHECK_EVERY_S, REST_S = 1.0, 3.0
"""How often a link is checked, and while it rests."""
_SILENT_CHECKS = 3
_UP_TIMEOUT_S = 10.0
_LONGEST_DELAY_S = 2.0
PATIENCE_S = 1.0
"""How long work waits for a lost broker before it is refused."""


class Link:
    """Two connections that are lost together; a lost pair is replaced after a random pause of at most 2 s.

    Args:
        url: Redis URL.
        on_up: Awaited with every new pair, before it is used.
        on_long_loss: Called at every failed attempt once the loss has lasted PATIENCE_S.
        lines: Where the connection for commands is shared with others.

    Attributes:
        expect: Called when this process has sent something that is answered in its inbox.
        end_of_tick: When what has come meanwhile leaves on a connection that is shared.
        rests: Whether nobody needs this process now, so that whatever it does every second it may do every REST_S.
    """

    def __init__(
        self,
        url: str,
        on_up: Callable[[], Awaitable[None]],
        on_long_loss: Callable[[], None] = lambda: None,
        lines: Lines | None = None,
    ) -> None:
        self._url = url
        self._open = lines.lane if lines else Connection.open
        self.end_of_tick = lines.end_of_tick if lines else None
        self.expect: Callable[[], None] = _nothing
        self._on_up = on_up
        self._on_long_loss = on_long_loss
        self._lost = asyncio.Event()
        self._coming: asyncio.Event | None = None
        """Where the first connection was not waited for: set when it is there, or has not come within PATIENCE_S."""
        self._keeper: asyncio.Task[None] | None = None
        self.sender = self.waiter = Connection()
        """While the pair is lost these are closed connections, which answer every command with `BrokerUnavailable`."""
        self.losses = 0
        self.rests = False
        self._lost_at: float | None = None
        self._heard = (0, 0)
        self._silent_checks = 0

    async def start(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailable, ConfigurationError: Redis cannot be used from here.
        """
        await self._connect()
        self._keeper = spawn(self._keep_connected())

    def start_soon(self) -> None:
        """Begin to connect, without waiting for it; what goes wrong meanwhile is a loss like any other."""
        self._lost.set()
        self._coming = asyncio.Event()
        self._keeper = spawn(self._keep_connected())

    async def first_sender(self) -> Connection:
        """The connection for commands, which is waited for while it is the first one; a closed one while Redis is
        away."""
        if self.is_coming and self._coming is not None:
            await self._coming.wait()
        return self.sender

    @property
    def is_coming(self) -> bool:
        """Whether the first connection is about to be there."""
        return self._coming is not None and not self._coming.is_set()

    @property
    def is_given_up(self) -> bool:
        """Whether the loss has lasted for so long that work which waits for it is refused."""
        return self._lost_at is not None and time.monotonic() - self._lost_at > PATIENCE_S

    async def stop(self) -> None:
        """Disconnect; unanswered commands fail."""
        await end(self._keeper)
        self._has_come()
        self._disconnect()

    @property
    def pause_s(self) -> float:
        """How long until the next check; blocking reads end then, too."""
        return until_next(REST_S if self.rests and self._silent_checks < 2 else CHECK_EVERY_S)

    def check(self) -> None:
        """Give up a pair of which one owes an answer and has been silent for three of these checks, as a half-open
        connection is; to be called every `pause_s`.

        After a rest a command that was not answered counts for two checks, but a blocking read for one: the server may
        end it a little late.

        Checks are counted instead of seconds: a process that was frozen finds answers it has not read yet.
        """
        sender, waiter = self.sender, self.waiter
        if not (sender.is_open and waiter.is_open):
            self._silent_checks = 0
            return
        heard = (-1 if sender.is_idle else sender.heard, -1 if waiter.is_idle else waiter.heard)
        sender_is_silent, waiter_is_silent = (old == new != -1 for old, new in zip(self._heard, heard, strict=True))
        if sender_is_silent or waiter_is_silent:
            self._silent_checks += 2 if sender_is_silent and self.rests else 1
        else:
            self._silent_checks = 0
        self._heard = heard
        if self._silent_checks >= _SILENT_CHECKS:
            logger.warning("Redis has fallen silent")
            self._silent_checks = 0
            sender.give_up()
            self.lose()
        elif sender.is_idle:
            sender.send(ignore_answer, "PING")  # so that it owes one

    def lose(self) -> None:
        """Give up this pair of connections and make another."""
        if self.sender.is_retiring or self.waiter.is_retiring:
            return  # for the last answers
        self._disconnect()
        self.losses += 1
        self._lost.set()

    def _moved(self) -> None:
        """The server of the cluster does not have the slot any more: look for another when all is answered."""
        self.sender.retire()
        self.waiter.retire()

    def descriptors(self) -> list[int]:
        """File descriptors of the open connections, for whoever must close them after a fork."""
        found = (self.sender.descriptor(), self.waiter.descriptor())
        return [descriptor for descriptor in found if descriptor is not None]

    async def _connect(self) -> None:
        self._disconnect()  # what is left of a pair that was retired while it came up
        sender = await self._open(self._url, self.lose, self._moved)
        try:
            # Not asked for again: after a failover sentinels disagree for a while, and what is read from one server
            # cannot be answered on another.
            waiter = await sender.another(self.lose, self._moved)
        except BaseException:
            sender.close()
            raise
        self.sender, self.waiter = sender, waiter
        try:
            async with asyncio.timeout(_UP_TIMEOUT_S):
                await self._on_up()
        except TimeoutError as exc:
            self._disconnect()
            text = f"Redis has let this process in, but not answered within {_UP_TIMEOUT_S:g} s: see what keeps it busy"
            raise BrokerUnavailable(text) from exc
        except CommandRefused as exc:
            self._disconnect()
            wrong = str(exc).startswith(("NOAUTH", "NOPERM", "WRONGPASS"))
            if wrong:
                raise ConfigurationError(refused(exc)) from exc
            raise BrokerUnavailable(f"Redis does not take commands now: {exc}. Try again in a moment") from exc
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        self.sender.close()
        self.waiter.close()

    def _has_come(self) -> None:
        if self._coming is not None:
            self._coming.set()

    async def _keep_connected(self) -> None:
        while True:
            await self._lost.wait()
            self._lost.clear()
            if self.losses:
                logger.warning("lost the connection to Redis; reconnecting")
            lost_at, delay, told = time.monotonic(), 0.05, ""
            self._lost_at = lost_at
            while not self.sender.is_open:
                try:
                    await self._connect()
                    break  # if it has been retired already, it says itself when it is lost
                except QServeError as exc:
                    if isinstance(exc, ConfigurationError) and str(exc) != told:
                        told = str(exc)
                        logger.error("Redis cannot be used: %s", told)  # waiting does not mend it
                    if time.monotonic() - lost_at > PATIENCE_S:
                        self._has_come()
                        self._on_long_loss()
                    await asyncio.sleep(CHANCE.uniform(0, delay))
                    delay = min(delay * 2, _LONGEST_DELAY_S)
            self._lost_at = None
            self._has_come()
            if self.losses:
                logger.info("connected to Redis again")


def _nothing() -> None:
    """No inbox is read."""
