"""The scripts against a model of what they promise, in any order that Hypothesis can think of."""

from dataclasses import dataclass

import fakeredis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from hypothesis.strategies import booleans, integers, sampled_from

from qserve.broker.instance.heartbeats import LEFT
from qserve.broker.keys import GROUP
from tests.support.echo_queue import BEATS, STREAM, Queue

BOUND = 5
replicas = sampled_from("ABC")


@dataclass
class Entry:
    """What the model knows of a call: who has it, how often it was started, and whether it waits to be again."""

    safe: bool
    owner: str | None = None
    starts: int = 0
    waits: bool = False


class Machine(RuleBasedStateMachine):
    """Callers put and cancel, replicas read, answer, die, leave, come back, and take over from each other."""

    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(fakeredis.FakeRedis(version=(7,)))
        self.queue.deploy(BOUND)
        self.model: dict[bytes, Entry] = {}
        self.answered = 0
        self.inbox = 0

    @rule(target=entries, count=integers(1, 3), safe=booleans())
    def put(self, count: int, safe: bool) -> object:
        room = BOUND - len(self.model)
        depth, _, *admitted = self.queue.put(*"abc"[:count], flags="s" if safe else "")
        assert depth == len(self.model)
        put = [entry for entry in admitted if entry is not None]
        assert len(put) == min(count, room)
        self.model |= {entry: Entry(safe) for entry in put}
        return multiple(*put)

    @rule(replica=replicas, most=integers(1, 3))
    def read(self, replica: str, most: int) -> None:
        waiting = [entry for entry, call in self.model.items() if call.owner is None]
        assert self.queue.read(replica, most) == waiting[:most]
        for entry in waiting[:most]:
            self.model[entry] = Entry(self.model[entry].safe, replica, starts=1)

    @rule(entry=entries)
    def reply(self, entry: bytes) -> None:
        """Whoever comes first, owner or not: the entry is given out and not answered yet."""
        call = self.model.get(entry)
        counts = call is not None and call.owner is not None
        assert self.queue.reply((entry, "answer")) == counts
        if counts:
            del self.model[entry]
            self.inbox += 1

    @rule(entry=consumes(entries))
    def give_up(self, entry: bytes) -> None:
        call = self.model.get(entry)
        counts = call is not None and call.owner is not None
        assert self.queue.give_up(entry) == counts
        if counts:
            del self.model[entry]
            self.inbox += 1

    @rule(entry=entries)
    def cancel(self, entry: bytes) -> None:
        call = self.model.get(entry)
        answer = self.queue.cancel(entry)
        if call is None:
            assert answer == 0
        elif call.owner is None:
            assert answer == 1
            del self.model[entry]
        else:
            assert answer == call.owner.encode()

    @rule(replica=replicas)
    def beat(self, replica: str) -> None:
        asked = sorted(self.model)
        lost = [entry for entry in asked if self.model[entry].owner != replica]
        assert self.queue.beat(replica, *asked) == lost

    @rule(dead=replicas, heir=replicas, left=booleans(), up_to=integers(0, 3), most=integers(1, 3))
    def take(self, dead: str, heir: str, left: bool, up_to: int, most: int) -> None:
        if dead == heir:
            return
        self.queue.die(dead)
        if left:
            self.queue.redis.hset(BEATS, dead, LEFT)
        expected: list[tuple[int, bytes]] = []
        for entry, call in self.model.items():
            if call.owner != dead or len(expected) == most:
                continue
            suspect = not left or call.starts > 1 or call.waits
            start = 1 if not suspect else call.starts + 1 - (left and not call.waits)
            if start > up_to and (call.safe or not suspect):
                continue
            if suspect and not call.waits:
                # a start that a leaving replica hands back does not count
                call.starts -= left
                call.waits = True
            call.owner = heir
            expected.append((start, entry))
        assert self.queue.take(dead, heir, most, up_to=up_to) == expected

    @rule(replica=replicas, entry=entries)
    def start(self, replica: str, entry: bytes) -> None:
        call = self.model.get(entry)
        mine = call is not None and call.owner == replica
        assert self.queue.start(replica, entry) == mine
        if mine and call is not None and call.waits:
            call.waits = False
            call.starts += 1

    @rule(replica=replicas)
    def retire(self, replica: str) -> None:
        assert self.queue.retire(replica) == all(call.owner != replica for call in self.model.values())

    @invariant()
    def nothing_is_lost_or_twice(self) -> None:
        assert self.queue.depth() == len(self.model) <= BOUND
        assert len(self.queue.inbox()) == self.inbox
        for replica in "ABC":
            assert self.queue.pending(replica) == [e for e, call in self.model.items() if call.owner == replica]
        summary = self.queue.redis.xpending(STREAM, GROUP)
        assert summary["pending"] == sum(call.owner is not None for call in self.model.values())


TestModel = Machine.TestCase
TestModel.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
