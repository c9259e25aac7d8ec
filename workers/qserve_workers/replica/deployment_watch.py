"""What is deployed under the name of a replica, and every change of it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from qserve.background import end, spawn
from qserve.broker.instance.change_log import connect_asyncio, follow, last_log_id, read_meta
from qserve.broker.instance.remembered_state import restore
from qserve.broker.instance.reports import read_replicas
from qserve.broker.instance.state import decode_deployed
from qserve.broker.redis_errors import CommandRefused
from qserve.errors import BrokerUnavailable, ConfigurationError, FrameRejected
from qserve.settings import Settings
from qserve.wire.messages import Signer
from qserve.wire.spec import SERVING, Deployed
from qserve_workers.replica.birth import first_of

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0


class DeploymentWatch:
    """Follows one deployment, whatever its replica is busy with: a constructor may hang.

    Args:
        on_seen: Called with what is deployed, None if it was deleted, at every change.

    Attributes:
        changed: Set at every change.
        served: What this replica serves; it is put back, and still counts, when the server has lost it.
    """

    def __init__(
        self, settings: Settings, name: str, signer: Signer, on_seen: Callable[[Deployed | None], None]
    ) -> None:
        self.changed = asyncio.Event()
        self.served: Deployed | None = None
        self._settings = settings
        self._keys = settings.keys
        self._name = name
        self._signer = signer
        self._on_seen = on_seen
        self._redis = connect_asyncio(settings.redis_url)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow."""
        self._task = spawn(self._follow(await last_log_id(self._redis, self._keys)))

    async def stop(self) -> None:
        """Follow no more."""
        await end(self._task)
        await self._redis.aclose()

    async def until_deployed(self, leave: asyncio.Event) -> Deployed | None:
        """What is deployed, as soon as anything is; None if `leave` is set first."""
        while not leave.is_set():
            self.changed.clear()
            deployed = await self.read()
            if deployed is not None:
                self._on_seen(deployed)
                return deployed
            await first_of(self.changed, leave, timeout=_LOOK_EVERY_S)
        return None

    async def read(self) -> Deployed | None:
        """What is deployed now, None when nothing is; a spec that no key of ours signed changes nothing.

        Raises:
            BrokerUnavailable: Redis cannot be asked.
        """
        with _unavailable_if_refused():
            meta = await read_meta(self._redis, self._keys, self._name)
        try:
            if meta[0] is None and self.served is not None:  # deleting leaves the generation
                return await self._remember(self.served)
            return decode_deployed(self._signer, self._name, meta)
        except FrameRejected as exc:
            logger.error("Ignoring the spec of deployment %r: %s", self._name, exc)
            return self.served

    async def is_outdated(self, revision: str) -> bool:
        """Whether another revision is deployed and served already; raises like `read`."""
        deployed = await self.read()
        if deployed is None or deployed.spec.revision == revision:
            return False
        with _unavailable_if_refused():
            others = (await read_replicas(self._redis, self._keys, self._name)).values()
        return any(info.state == SERVING and info.revision == deployed.spec.revision for info in others)

    async def _follow(self, from_id: str) -> None:
        async for change in follow(self._settings.redis_url, self._keys, from_id):
            if change.name in ("", self._name):
                with contextlib.suppress(BrokerUnavailable):  # a resync follows
                    self._on_seen(await self.read())
                self.changed.set()

    async def _remember(self, deployed: Deployed) -> Deployed:
        """The server has lost what was deployed: that is no wish to end it."""
        if self._settings.autorestore and await restore(self._redis, self._keys, self._signer, [deployed]):
            logger.warning("Deployment %s: Redis has lost it; it was put back", self._name)
        return deployed


@contextlib.contextmanager
def _unavailable_if_refused() -> Iterator[None]:
    """A replica that may not look at the state now goes on as it is, and looks again."""
    try:
        yield
    except (ConfigurationError, CommandRefused) as exc:
        raise BrokerUnavailable(f"Redis refuses to tell: {exc}") from exc
