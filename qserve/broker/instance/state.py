"""The desired state in Redis: what should run, and how HTTP is served.

`State` is what a driver works with: synchronous, usable from any thread. Processes that follow the state (gateway,
node, replica) use the module `following` on their event loop. Specs and HTTP settings are signed like calls are, since
they may carry pickles.
"""

import secrets
from collections.abc import Callable, Collection, Iterable
from logging import getLogger
from typing import Any, Literal, TypeVar

from qserve.broker.instance.observed import Observed
from qserve.broker.instance.remains import fail_remaining, forget_remains
from qserve.broker.keys import GROUP, Keys
from qserve.broker.payloads import LARGEST_STORED
from qserve.broker.records import fail_remaining_records
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import DELETE, DEPLOY, PAUSE, SET_STATE, SIGN, Script
from qserve.broker.server import redis_clients
from qserve.errors import BrokerUnavailable, ConfigurationError, FrameRejected, PayloadTooLarge
from qserve.failpoints import reach
from qserve.wire.messages import Signer, decoder_of, encode
from qserve.wire.names import is_name
from qserve.wire.options import script_fields
from qserve.wire.spec import (
    DEPLOYING,
    WAITING,
    Deployed,
    DeploymentSpec,
    HttpSettings,
    SignedSpec,
)

logger = getLogger(__name__)

_COMMAND_TIMEOUT_S = 5.0
_LONGEST_NAME = 200


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
        self.observed = Observed(self.redis, keys)

    def close(self) -> None:
        """Close the connections."""
        self.redis.close()

    def ping(self) -> bool:
        """Whether Redis answers."""
        try:
            return bool(self._do("PING"))
        except BrokerUnavailable:
            return False

    def deploy(
        self,
        spec: DeploymentSpec,
        *,
        expected: int,
        former: Deployed | Literal[""] | None = None,
        moving: Collection[str] = (),
    ) -> Deployed:
        """Make `spec` the desired state of its name.

        Args:
            spec: What should run.
            expected: Generation that `get` or `generation` showed; 0 where the name was never used.
            former: What `former` gives from now on: "" for nothing, and None leaves that as it is.
            moving: Deployments that are given another route right after this one, so that theirs are free.

        Raises:
            GenerationChanged: The deployment has moved on since.
            ValueError: Its route belongs to another deployment. Nothing is written then.
            PayloadTooLarge: It is larger than what Redis keeps in one place.
        """
        names = self.keys.of(spec.name)
        keys = (names.meta(spec.name), names.deployments, names.log, names.calls(spec.name), names.instance)
        route = spec.route_prefix or ""
        frame = self.signer.seal(encode(SignedSpec(expected + 1, spec)))
        if len(frame) > LARGEST_STORED:
            raise PayloadTooLarge(
                f"Deployment {spec.name!r} takes {len(frame):,} bytes with the arguments of its constructor, its "
                f"user_config and code that is sent as a pickle, and Redis keeps no more than {LARGEST_STORED:,} in "
                "one place: put what is large into a file, and load it in the constructor"
            )
        history, free = secrets.token_hex(16), "\n".join(moving)
        arguments = (spec.name, expected, frame, GROUP, route, f"{names.base}meta:", history, free)
        fields: list[str | bytes | int] = [*script_fields(spec)]
        if former is not None:
            sealed = self.signer.seal(encode(SignedSpec(former.generation, former.spec))) if former else b""
            fields += ["former", sealed]
        if self.keys.shards > 1:
            self._look_around({spec.name, *moving}, route)
        reach("deploy")
        verdict, *facts = self._run(DEPLOY, keys, *arguments, *fields)
        reach("deployed")
        if verdict == b"route":
            raise ValueError(f"route_prefix '{route}' is already registered.")
        if verdict == b"generation":
            raise GenerationChanged(spec.name)
        generation, log_id = facts
        return Deployed(spec, generation, DEPLOYING, "", self._announce(log_id, "deploy", spec.name, generation))

    def delete(self, name: str, *, expected: int | None = None) -> str | None:
        """Forget a deployment; returns the log id, or None when there was none.

        Raises:
            GenerationChanged: It is not at generation `expected`.
        """
        names = self.keys.of(name)
        keys = (names.meta(name), names.deployments, names.log)
        verdict, *facts = self._run(DELETE, keys, name, "" if expected is None else expected)
        if verdict == b"generation":
            raise GenerationChanged(name)
        return self._announce(facts[1], "delete", name, facts[0]) if verdict == b"ok" else None

    def clear_up(self, name: str, error: bytes) -> None:
        """Answer the calls that a deleted deployment leaves with an encoded ErrorInfo, and forget the rest of it.

        What stands in the queue of another deployment of that name is left alone.
        """
        for clear in (fail_remaining, fail_remaining_records):
            if self.find(name) is None:
                clear(self.redis, self.keys, name, self.signer, error)
        if self.find(name) is None:
            forget_remains(self.redis, self.keys, name)

    def set_state(self, name: str, generation: int, state: str, *, error: str = "", refuse: str = "") -> bool:
        """Note how far a generation has come; False when the deployment has moved on.

        Args:
            name, generation: What is judged.
            state: WAITING, DEPLOYING, HEALTHY or DEPLOY_FAILED.
            error: What went wrong, for `status`.
            refuse: Why calls are turned away at once; "" lets them in.
        """
        return bool(self._run(SET_STATE, (self.keys.meta(name),), generation, state, error, refuse))

    def pause(self, name: str, who: str) -> bool:
        """Let calls be accepted but not run, or run again if `who` is ""; False where there is no such deployment."""
        is_known = bool(self._run(PAUSE, (self.keys.meta(name), self.keys.of(name).log), name, who[:_LONGEST_NAME]))
        if is_known:
            self._announce(b"", "pause", name)
        return is_known

    def former(self, name: str) -> DeploymentSpec | None:
        """What was served before the present revision; None if that is not known.

        Raises:
            FrameRejected: It was not signed with a key of ours.
        """
        frame = self._do("HGET", self.keys.meta(name), "former")
        signed = _decode_spec(self.signer.open(frame)) if frame else None
        return signed.spec if signed is not None and signed.spec.name == name else None

    def names(self) -> list[str]:
        """The names of all deployments, in order; without those in shards that are down, with a warning in the log."""
        found: list[bytes] = []
        for keys in self.keys.all():
            try:
                found += self._do("SMEMBERS", keys.deployments)
            except BrokerUnavailable as exc:
                if self.keys.shards == 1:
                    raise
                logger.warning("What is deployed in shard %d of the cluster is left out: %s", keys.shard, exc)
        return names_of(found)

    def sign_again(self, deployed: Deployed) -> None:
        """Sign a spec with the first key where another one has signed it, so that the other can be dropped."""
        key, spec = self.keys.meta(deployed.spec.name), deployed.spec
        frame = self._do("HGET", key, "spec")
        if frame is not None and not self.signer.is_own(frame):
            signed = self.signer.seal(encode(SignedSpec(deployed.generation, spec)))
            self._run(SIGN, (key,), deployed.generation, signed)

    def generation(self, name: str) -> int:
        """The newest generation ever used under a name; 0 if there was none."""
        return int(self._do("HGET", self.keys.meta(name), "gen") or 0)

    def get(self, name: str) -> Deployed | None:
        """The deployment of a name; None if there is none.

        Raises:
            FrameRejected: Its spec was not signed with a key of ours.
        """
        return decode_deployed(self.signer, name, self._do("HMGET", self.keys.meta(name), *META_FIELDS))

    def find(self, name: str) -> Deployed | None:
        """Like `get`; a spec that no key of ours signed gives None and an error in the log."""
        return checked(lambda: self.get(name), f"the spec of deployment {name!r}")

    def list(self) -> dict[str, Deployed]:
        """Every deployment by name; a spec that no key of ours signed is left out, with an error in the log."""
        found = ((name, self.find(name)) for name in self.names())
        return {name: deployed for name, deployed in found if deployed is not None}

    def check_key(self) -> None:
        """Check that what is deployed can be read.

        Raises:
            FrameRejected: Not one of the specs was signed with a key of ours: so this process has another one.
        """
        rejected = None
        for name in self.names():
            try:
                self.get(name)
            except FrameRejected as exc:
                rejected = exc
            else:
                return
        if rejected is not None:
            raise rejected

    def routes(self) -> dict[str, str]:
        """The name of the deployment of each route prefix."""
        return {d.spec.route_prefix: name for name, d in self.list().items() if d.spec.route_prefix is not None}

    def get_http(self) -> HttpSettings:
        """The HTTP options that every gateway follows."""
        return decode_http(self.signer, self._do("GET", self.keys.http_options))

    def set_http(self, settings: HttpSettings) -> str:
        """Change the HTTP settings of every gateway; returns the log id."""
        self._do("SET", self.keys.http_options, self.signer.seal(encode(settings)))
        log_id: bytes = self._do("XADD", self.keys.log, "MAXLEN", "~", 1000, "*", "kind", "http")
        return log_id.decode()

    def _announce(self, log_id: bytes, kind: str, name: str, generation: int = 0) -> str:
        """Note a change of a shard in the log of the home, which gateways and nodes follow; returns the id there.

        Whoever is killed before it leaves a change that they notice when they look by themselves, within a minute.

        Args:
            log_id: Of the change in its shard, which is the home where there are no others.
        """
        if self.keys.shards == 1:
            return log_id.decode()
        self._do("SET", self.keys.instance, secrets.token_hex(16), "NX")
        change = ("kind", kind, "name", name, "gen", generation)
        noted: bytes = self._do("XADD", self.keys.log, "MAXLEN", "~", 1000, "*", *change)
        return noted.decode()

    def _look_around(self, names: Collection[str], route: str) -> None:
        """Settle the number of shards, and check the route, for which DEPLOY looks at its own shard only: of two
        deployments that take one at the same time, nobody notices."""
        self._do("SET", self.keys.shard_count, self.keys.shards, "NX")
        check_shards(self.keys, self._do("GET", self.keys.shard_count))
        for other in self.names() if route else ():
            if other not in names and self._do("HGET", self.keys.meta(other), "route") == route.encode():
                raise ValueError(f"route_prefix '{route}' is already registered.")

    def _run(self, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
        with our_errors(self.redis):
            return script.run(self.redis, keys, *arguments)

    def _do(self, *command: Any) -> Any:
        with our_errors(self.redis):
            return self.redis.execute_command(*command)  # type: ignore[no-untyped-call]


def check_shards(keys: Keys, settled: bytes | None) -> None:
    """Refuse another number of shards than that with which the instance was first used."""
    if settled is not None and int(settled) != keys.shards:
        raise ConfigurationError(
            f"this instance has {int(settled)} shards, and QSERVE_REDIS_URL says {keys.shards}: write ?shards="
            f"{int(settled)} there, or delete what is deployed and use another namespace"
        )


def names_of(members: Iterable[bytes]) -> list[str]:
    """The names among the members of a set that others can write to, in order."""
    return sorted(name for name in (member.decode(errors="replace") for member in members) if is_name(name))


# From bytes to data

META_FIELDS = ("gen", "spec", "state", "error", "log_id", "paused", "asleep")
_decode_spec = decoder_of(SignedSpec)
_decode_http = decoder_of(HttpSettings)


def decode_deployed(signer: Signer, name: str, fields: list[bytes | None]) -> Deployed | None:
    """A deployment from the fields of its meta hash; verified before it is decoded.

    Raises:
        FrameRejected: No key of ours signed it as the spec of this name and generation.
    """
    generation, frame, state, error, log_id, paused, asleep = fields
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
        (paused or b"").decode(errors="replace"),
        bool(asleep),
    )


def decode_http(signer: Signer, frame: bytes | None) -> HttpSettings:
    """HTTP settings from their frame; verified before they are decoded."""
    return _decode_http(signer.open(frame)) if frame else HttpSettings()


Decoded = TypeVar("Decoded")


def checked(read: Callable[[], Decoded], what: str) -> Decoded | None:
    """What `read` returns; None, with an error in the log, where no key of ours has signed it."""
    try:
        return read()
    except FrameRejected as exc:
        logger.error("Ignoring %s: %s", what, exc)
        return None
