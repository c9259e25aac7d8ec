"""Desired and observed state in Redis: what should run, what does run, and who serves HTTP.

`State` is what a driver works with: synchronous, usable from any thread. Processes that follow the state (gateway,
node, replica) use `qserve.broker.following` on their event loop. Specs and HTTP settings are signed like calls are,
since they may carry pickles.
"""

import os
import secrets
import socket
from collections.abc import Callable, Iterable
from logging import getLogger
from typing import Any, TypeVar

import redis
import redis.asyncio

from qserve.broker import redis_clients
from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.reports import Info, decode_infos
from qserve.broker.scripts import DELETE, DEPLOY, SET_STATE, SIGN, Script
from qserve.errors import BrokerUnavailable, FrameRejected
from qserve.failpoints import reach
from qserve.wire.messages import Signer, decoder_of, encode
from qserve.wire.names import is_name
from qserve.wire.options import script_fields
from qserve.wire.spec import (
    DEPLOYING,
    WAITING,
    Deployed,
    DeploymentSpec,
    GatewayInfo,
    HttpSettings,
    NodeInfo,
    ReplicaInfo,
    SignedSpec,
    WorkerInfo,
)

logger = getLogger(__name__)

_COMMAND_TIMEOUT_S = 5.0


class GenerationChanged(Exception):
    """Another deploy or delete came first; read again and decide again."""


class State:
    """The state of one namespace, for a driver. Thread-safe, synchronous.

    Writes are never repeated by themselves: a lost answer raises `BrokerUnavailable`, and the caller reads what became
    of it.
    """

    def __init__(self, redis_url: str, keys: Keys, signer: Signer) -> None:
        self.keys = keys
        self.signer = signer
        self.redis = redis_clients.client(redis_url, _COMMAND_TIMEOUT_S)

    def close(self) -> None:
        """Close the connections."""
        self.redis.close()

    def ping(self) -> bool:
        """Whether Redis answers."""
        try:
            return bool(self._do("PING"))
        except BrokerUnavailable:
            return False

    # Desired state

    def deploy(self, spec: DeploymentSpec, *, expected: int) -> Deployed:
        """Make `spec` the desired state of its name.

        Args:
            spec: What should run.
            expected: Generation that `get` or `generation` showed; 0 where the name was never used.

        Raises:
            GenerationChanged: The deployment has moved on since.
            ValueError: Its route belongs to another deployment. Nothing is written then.
        """
        names = self.keys
        keys = (names.meta(spec.name), names.deployments, names.log, names.calls(spec.name), names.instance)
        route = spec.route_prefix or ""
        frame = self.signer.seal(encode(SignedSpec(expected + 1, spec)))
        arguments = (spec.name, expected, frame, GROUP, route, names.meta(""), secrets.token_hex(16))
        reach("deploy")
        verdict, *facts = self._run(DEPLOY, keys, *arguments, *script_fields(spec))
        reach("deployed")
        if verdict == b"route":
            raise ValueError(f"route_prefix '{route}' is already registered.")
        if verdict == b"generation":
            raise GenerationChanged(spec.name)
        generation, log_id = facts
        return Deployed(spec, generation, DEPLOYING, "", log_id.decode())

    def delete(self, name: str, *, expected: int | None = None) -> str | None:
        """Forget a deployment; returns the log id, or None when there was none.

        Raises:
            GenerationChanged: It is not at generation `expected`.
        """
        keys = (self.keys.meta(name), self.keys.deployments, self.keys.log)
        verdict, *facts = self._run(DELETE, keys, name, "" if expected is None else expected)
        if verdict == b"generation":
            raise GenerationChanged(name)
        return facts[1].decode() if verdict == b"ok" else None

    def settle(self, name: str, generation: int, state: str, *, error: str = "", refuse: str = "") -> bool:
        """Note how far a generation has come; False when the deployment has moved on.

        Args:
            name, generation: What is judged.
            state: WAITING, DEPLOYING, HEALTHY or DEPLOY_FAILED.
            error: What went wrong, for `status`.
            refuse: Why calls are turned away at once; "" lets them in.
        """
        return bool(self._run(SET_STATE, (self.keys.meta(name),), generation, state, error, refuse))

    def sign_again(self, deployed: Deployed) -> None:
        """Sign a spec with the first key where another one has signed it, so that the other can be dropped."""
        key, spec = self.keys.meta(deployed.spec.name), deployed.spec
        frame = self._do("HGET", key, "spec")
        if frame is not None and not self.signer.is_own(frame):
            signed = self.signer.seal(encode(SignedSpec(deployed.generation, spec)))
            self._run(SIGN, (key,), deployed.generation, signed)

    def generation(self, name: str) -> int:
        """The newest generation ever used under a name, 0 for none."""
        return int(self._do("HGET", self.keys.meta(name), "gen") or 0)

    def get(self, name: str) -> Deployed | None:
        """The deployment of a name, None where there is none.

        Raises:
            FrameRejected: Its spec was not signed with a key of ours.
        """
        return decode_deployed(self.signer, name, self._do("HMGET", self.keys.meta(name), *META_FIELDS))

    def find(self, name: str) -> Deployed | None:
        """Like `get`; None with an error in the log for a spec that no key of ours signed."""
        return checked(lambda: self.get(name), f"the spec of deployment {name!r}")

    def list(self) -> dict[str, Deployed]:
        """Every deployment by name; a spec that no key of ours signed is left out, with an error in the log."""
        found = ((name, self.find(name)) for name in names_of(self._do("SMEMBERS", self.keys.deployments)))
        return {name: deployed for name, deployed in found if deployed is not None}

    def check_key(self) -> None:
        """See that what is deployed can be read.

        Raises:
            FrameRejected: Not one of the specs was signed with a key of ours: so this process has another one.
        """
        rejected = None
        for name in names_of(self._do("SMEMBERS", self.keys.deployments)):
            try:
                self.get(name)
            except FrameRejected as exc:
                rejected = exc
            else:
                return
        if rejected is not None:
            raise rejected

    def routes(self) -> dict[str, str]:
        """Route prefix -> deployment name."""
        return {d.spec.route_prefix: name for name, d in self.list().items() if d.spec.route_prefix is not None}

    def get_http(self) -> HttpSettings:
        """What every gateway needs to know of the HTTP options."""
        return decode_http(self.signer, self._do("GET", self.keys.http_options))

    def set_http(self, settings: HttpSettings) -> str:
        """Change the HTTP settings of every gateway; returns the log id."""
        self._do("SET", self.keys.http_options, self.signer.seal(encode(settings)))
        log_id: bytes = self._do("XADD", self.keys.log, "MAXLEN", "~", 1000, "*", "kind", "http")
        return log_id.decode()

    # Observed state

    def nodes(self) -> dict[str, NodeInfo]:
        """Live nodes by id."""
        return self._alive(self._infos(self.keys.nodes, NodeInfo))

    def gateways(self) -> dict[str, GatewayInfo]:
        """Live gateways by id."""
        found = self._alive(self._infos(self.keys.gateways, GatewayInfo))
        return {id_: info for id_, info in found.items() if not _gone_from_here(info.host, info.pid)}

    def workers(self, name: str) -> dict[str, WorkerInfo]:
        """What each node's Celery worker last reported for a deployment, by node id."""
        return self._infos(self.keys.workers(name), WorkerInfo)

    def replicas(self, name: str) -> dict[str, ReplicaInfo]:
        """Replicas of a deployment by id, without those whose death is known."""
        beats = self._do("HGETALL", self.keys.heartbeats(name))
        gone = {id_.decode() for id_, beat in beats.items() if not beat.isdigit()}
        found = self._infos(self.keys.replicas(name), ReplicaInfo)
        return {id_: info for id_, info in found.items() if id_ not in gone}

    def is_alive(self, process: str) -> bool:
        """Whether a process has said that it lives, within the lifetime of its role (`qserve.broker.presence`)."""
        return bool(self._do("EXISTS", self.keys.alive(process)))

    def queued(self, name: str) -> int:
        """Calls of a deployment that wait or run."""
        return int(self._do("XLEN", self.keys.calls(name)))

    def waiting(self, name: str) -> tuple[int, float]:
        """Calls of a deployment that no replica has taken: how many, and the seconds for which the first has waited."""
        key = self.keys.calls(name)
        try:
            (group, *_) = self._do("XINFO", "GROUPS", key)
        except (redis.exceptions.ResponseError, ValueError):
            return 0, 0.0
        facts = dict(zip(group[::2], group[1::2], strict=True))
        first = self._do("XRANGE", key, b"(" + facts[b"last-delivered-id"], "+", "COUNT", 1)
        if not first:
            return 0, 0.0
        now = self._do("TIME")
        age_s = now[0] + now[1] / 1e6 - int(first[0][0].split(b"-")[0]) / 1000
        return self.queued(name) - int(facts[b"pending"]), max(0.0, age_s)

    def counters(self) -> dict[str, int]:
        """Rare events of all processes, by name."""
        found: dict[bytes, bytes] = self._do("HGETALL", self.keys.counters)
        return {name.decode(): int(count) for name, count in found.items()}

    def forget_remains(self, name: str) -> None:
        """Remove what is left of a deleted deployment: its queue, and what its replicas and workers reported."""
        keys = (self.keys.replicas(name), self.keys.heartbeats(name), self.keys.workers(name), self.keys.calls(name))
        self._do("DEL", *keys)

    def _infos(self, key: str, kind: type[Info]) -> dict[str, Info]:
        return dict(decode_infos(self._do("HGETALL", key), kind))

    def _alive(self, infos: dict[str, Info]) -> dict[str, Info]:
        return {id_: info for id_, info in infos.items() if self.is_alive(id_)}

    def _run(self, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
        with our_errors(self.redis):
            return script.run(self.redis, keys, *arguments)

    def _do(self, *command: Any) -> Any:
        with our_errors(self.redis):
            return self.redis.execute_command(*command)  # type: ignore[no-untyped-call]


def names_of(members: Iterable[bytes]) -> list[str]:
    """The names among the members of a set that others can write to, in order."""
    return sorted(name for name in (member.decode(errors="replace") for member in members) if is_name(name))


# From bytes to data

META_FIELDS = ("gen", "spec", "state", "error", "log_id")
_decode_spec = decoder_of(SignedSpec)
_decode_http = decoder_of(HttpSettings)


def decode_deployed(signer: Signer, name: str, fields: list[bytes | None]) -> Deployed | None:
    """A deployment from the fields of its meta hash; verified before it is decoded.

    Raises:
        FrameRejected: No key of ours signed it as the spec of this name and generation.
    """
    generation, frame, state, error, log_id = fields
    if generation is None or frame is None:
        return None
    signed = _decode_spec(signer.open(frame))
    if signed.spec.name != name or b"%d" % signed.generation != generation:
        raise FrameRejected(f"the spec of {signed.spec.name!r}, generation {signed.generation}, not of this one")
    return Deployed(
        signed.spec,
        signed.generation,
        (state or WAITING.encode()).decode(errors="replace"),
        (error or b"").decode(errors="replace"),
        (log_id or b"0-0").decode(errors="replace"),
    )


def decode_http(signer: Signer, frame: bytes | None) -> HttpSettings:
    """HTTP settings from their frame; verified before they are decoded."""
    return _decode_http(signer.open(frame)) if frame else HttpSettings()


Decoded = TypeVar("Decoded")


def checked(read: Callable[[], Decoded], what: str) -> Decoded | None:
    try:
        return read()
    except FrameRejected as exc:
        logger.error("Ignoring %s: %s", what, exc)
        return None


def _gone_from_here(host: str, pid: int) -> bool:
    """Whether a process of this host has ended, though its alive key may last a while longer."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
