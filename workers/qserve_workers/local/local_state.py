"""What is deployed in this process, in the place of the state in Redis."""

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, Literal

from qserve.broker.instance.observed import Observed
from qserve.broker.instance.state import GenerationChanged, State
from qserve.wire.spec import HEALTHY, Deployed, DeploymentSpec, HttpSettings
from qserve_workers.local.local_client import LocalClient


class LocalState(State):
    """The desired state of one process, which serves a deployment when it is written down. Thread-safe.

    Its methods wait for the event loop of the client, so they must not be called from there.
    """

    def __init__(self, client: LocalClient) -> None:
        super().__init__(client.settings.redis_url, client.settings.keys, client.signer)
        self.observed = _NobodyElse(self.redis, self.keys)
        self._client = client
        self._deployed: dict[str, Deployed] = {}
        self._generations: dict[str, int] = {}
        self._http = HttpSettings()

    def deploy(
        self,
        spec: DeploymentSpec,
        *,
        expected: int,
        former: Deployed | Literal[""] | None = None,
        moving: Collection[str] = (),
    ) -> Deployed:
        """Serve a deployment from now on.

        Raises:
            GenerationChanged: The deployment has moved on since.
            RuntimeError: User code raised when it was constructed, which is its cause.
            ValueError: Its route belongs to another deployment.
        """
        if self.generation(spec.name) != expected:
            raise GenerationChanged(spec.name)
        owner = None if spec.route_prefix is None else self.routes().get(spec.route_prefix)
        if owner not in (None, spec.name, *moving):
            raise ValueError(f"route_prefix '{spec.route_prefix}' is already registered.")
        try:
            self._wait_for(self._client.serve(spec))
        except Exception as exc:
            raise RuntimeError(f"Deployment {spec.name!r} could not be constructed: {exc!r}") from exc
        self._generations[spec.name] = expected + 1
        self._deployed[spec.name] = Deployed(spec, expected + 1, HEALTHY)
        return self._deployed[spec.name]

    def delete(self, name: str, *, expected: int | None = None) -> str | None:
        """Serve a deployment no more; returns None when there was none."""
        if self._deployed.pop(name, None) is None:
            return None
        self._wait_for(self._client.remove(name))
        return "0-0"

    def clear_up(self, name: str, error: bytes) -> None:
        """Nothing is left of a deployment that was deleted."""

    def set_state(self, name: str, generation: int, state: str, *, error: str = "", refuse: str = "") -> bool:
        """Nobody else reports how a deployment is doing."""
        return True

    def former(self, name: str) -> DeploymentSpec | None:
        """Nobody goes back to it."""
        return None

    def sign_again(self, deployed: Deployed) -> None:
        """Nothing is signed."""

    def generation(self, name: str) -> int:
        """How often this name was deployed."""
        return self._generations.get(name, 0)

    def get(self, name: str) -> Deployed | None:
        """The deployment of that name."""
        return self._deployed.get(name)

    def find(self, name: str) -> Deployed | None:
        """The deployment of that name."""
        return self._deployed.get(name)

    def list(self) -> dict[str, Deployed]:
        """All deployments by name."""
        return dict(self._deployed)

    def routes(self) -> dict[str, str]:
        """Route prefix -> deployment name."""
        return {
            each.spec.route_prefix: name for name, each in self._deployed.items() if each.spec.route_prefix is not None
        }

    def get_http(self) -> HttpSettings:
        """The HTTP settings, which have no effect here."""
        return self._http

    def set_http(self, settings: HttpSettings) -> str:
        """Keep the HTTP settings."""
        self._http = settings
        return "0-0"

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        if self._client.is_own_thread():
            work.close()
            raise RuntimeError("deploying here would block the event loop that constructs the deployment")
        asyncio.run_coroutine_threadsafe(work, self._client.loop).result()


class _NobodyElse(Observed):
    """There are no other processes."""

    def _do(self, *command: Any) -> Any:
        return {} if command[0] == "HGETALL" else 0
