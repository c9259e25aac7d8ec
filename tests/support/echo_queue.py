"""The queue of one deployment, used through the scripts of the broker."""

from typing import Any, cast

import fakeredis
import redis

from qserve.broker.instance.heartbeats import DIED
from qserve.broker.keys import GROUP, Keys
from qserve.broker.scripts import ADMIT, ADOPT, BEAT, CANCEL, GIVE_UP, HAND_OVER, REPLY, RETIRE, START_AGAIN, TAKE

KEYS = Keys("test")
STREAM, META, BEATS, INBOX = KEYS.calls("Echo"), KEYS.meta("Echo"), KEYS.heartbeats("Echo"), KEYS.inbox("caller")
ALIVE, LETTERS, REPLICAS = KEYS.alive("caller"), KEYS.dead_letters("Echo"), KEYS.replicas("Echo")
MODELS = KEYS.models("Echo")
_FLAGS = "#!lua flags=allow-oom\n"


class Queue:
    """The queue of deployment Echo, as its callers and replicas use it through the scripts."""

    def __init__(self, client: "redis.Redis") -> None:
        self.redis = client

    def run(self, script: Any, keys: tuple[str, ...], *arguments: Any) -> Any:
        if isinstance(self.redis, fakeredis.FakeRedis):  # does not know the line of flags
            return self.redis.eval(script.source.removeprefix(_FLAGS), len(keys), *keys, *arguments)
        return script.run(self.redis, keys, *arguments)

    def deploy(self, max_queued: int = 10) -> None:
        self.redis.hset(META, "max_queued", max_queued)
        self.redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        self.redis.set(ALIVE, "1", px=60_000)

    def put(self, *names: str, flags: str = "") -> list[Any]:
        calls = (part for name in names for part in (name, flags, name))
        answer: list[Any] = self.run(ADMIT, (STREAM, META, KEYS.instance), 0, *calls)
        return answer

    def read(self, replica: str, most: int = 10) -> list[bytes]:
        answer = cast("list[Any]", self.redis.xreadgroup(GROUP, replica, {STREAM: ">"}, count=most))
        return [entry for entry, _ in answer[0][1]] if answer else []

    def reply(self, *replies: tuple[bytes, str]) -> int:
        parts = (part for reply in replies for part in reply)
        return int(self.run(REPLY, (STREAM, INBOX, ALIVE), GROUP, 60_000, "1", *parts))

    def beat(self, replica: str, *entries: bytes, serving: bool = True) -> list[bytes]:
        lost: list[bytes] = self.run(BEAT, (STREAM, BEATS, META), GROUP, replica, "1" if serving else "0", *entries)
        return lost

    def take(self, replica: str, me: str, most: int = 16, *, up_to: int = 99) -> list[tuple[int, bytes]]:
        judged = self.redis.hget(BEATS, replica) or b""
        answer = self.run(TAKE, (STREAM, BEATS), GROUP, replica, me, most, up_to, judged)
        return [(start, entry) for start, (entry, _) in answer]

    def start(self, replica: str, entry: bytes) -> bool:
        return bool(self.run(START_AGAIN, (STREAM,), GROUP, replica, entry))

    def hand_over(self, entry: bytes, me: str, other: str, *, model: str = "", room: int = 0) -> Any:
        """Hand a call over; `other` is alive."""
        self.redis.set(KEYS.alive(other), "1")
        keys = (STREAM, BEATS, MODELS, KEYS.inbox(other), KEYS.alive(other))
        return self.run(HAND_OVER, keys, GROUP, me, entry, other, "frame", 60_000, model, room)

    def adopt(self, replica: str, entry: bytes) -> bool:
        return self.run(ADOPT, (STREAM,), GROUP, replica, entry) is not None

    def die(self, replica: str) -> None:
        self.redis.hset(BEATS, replica, DIED)

    def give_up(self, entry: bytes, frame: str = "error") -> bool:
        keys = (STREAM, LETTERS, INBOX, ALIVE)
        return bool(self.run(GIVE_UP, keys, GROUP, entry, "too bad", 100, frame, 60_000))

    def cancel(self, entry: bytes) -> Any:
        return self.run(CANCEL, (STREAM,), GROUP, entry)

    def retire(self, replica: str) -> bool:
        return bool(self.run(RETIRE, (STREAM, BEATS, REPLICAS, MODELS), GROUP, replica))

    def pending(self, replica: str) -> list[bytes]:
        found = cast("list[Any]", self.redis.xpending_range(STREAM, GROUP, "-", "+", 100, replica))
        return [each["message_id"] for each in found]

    def depth(self) -> int:
        return int(self.redis.xlen(STREAM))

    def inbox(self) -> list[bytes]:
        # From a script, since redis-py makes a dict of the fields of an entry, which may all have the same name.
        raw = cast("list[Any]", self.redis.eval("return redis.call('XRANGE', KEYS[1], '-', '+')", 1, INBOX))
        return [frame for _, fields in raw for frame in fields[1::2]]
