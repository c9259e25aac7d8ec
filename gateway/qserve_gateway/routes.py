"""Finds the deployment that a path belongs to: the longest route prefix of whole segments wins."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from qserve.wire.messages import NO_META
from qserve.wire.options import Backpressure
from qserve.wire.spec import DeploymentSpec


class Route(NamedTuple):
    """What the gateway needs to know of a deployment for each request.

    Attributes:
        root_path: The prefix that its application is told, as in ASGI.
        client_sets_deadline: The deadline is the client's, and so it holds while a body comes in, too.
        meta: What the gateway's hooks say beside the call.
        when_full: How clients are told that the queue is full.
        outlives_client: The call goes on when the client leaves before it is answered.
        sleeps: It has no replica; a call starts one.
    """

    deployment: str
    root_path: str
    timeout_s: float
    idempotent: bool
    client_sets_deadline: bool = False
    meta: Mapping[str, str] = NO_META
    when_full: Backpressure | None = None
    outlives_client: bool = False
    sleeps: bool = False


class RouteTable:
    """All routes at one moment; when the state changes, a new table is made.

    Args:
        specs: Deployments; those without a route prefix are only reachable through handles.
        root_path: Prefix under which the whole gateway lives, "" or "/x".
        timeout_s: For deployments that set none.
        asleep: Names of those that have no replicas.
    """

    def __init__(
        self,
        specs: Iterable[DeploymentSpec] = (),
        *,
        root_path: str = "",
        timeout_s: float = 60.0,
        asleep: Collection[str] = (),
    ) -> None:
        self.names: dict[str, str] = {}
        self._routes: dict[str, Route] = {}
        for spec in specs:
            if spec.route_prefix is None:
                continue
            self.names[spec.route_prefix] = spec.name
            path = root_path + spec.route_prefix.rstrip("/")
            self._routes[path] = Route(
                *(spec.name, path, spec.timeout_s or timeout_s, spec.idempotent),
                when_full=spec.backpressure,
                sleeps=spec.name in asleep,
            )
        self._depth = max((prefix.count("/") for prefix in self._routes), default=0)

    def match(self, path: str) -> Route | None:
        """Find the route with the longest prefix of whole segments: "/a" matches "/a" and "/a/b", but not "/ab"."""
        best = self._routes.get(path)
        if best is not None:
            return best
        best = self._routes.get("")
        end = 0
        # No deeper than the deepest prefix, so a path of a million slashes costs nothing.
        for _ in range(self._depth):
            end = path.find("/", end + 1)
            if end < 0:
                break
            best = self._routes.get(path[:end], best)
        return best
