"""Clients of redis-py for a cluster: each command goes to the primary of the slot in which its keys lie.

redis-py's own cluster client repeats commands by itself when an answer is lost. Here only those go out again which a
server has refused because their slot is, or is about to be, elsewhere: these were not carried out.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import redis
import redis.asyncio
from redis.cluster import parse_cluster_slots
from redis.exceptions import AskError, ClusterDownError, ConnectionError, MovedError, TryAgainError  # noqa: A004

from qserve.broker.server.address import Address, slot_of

ANY_SLOT: Final = -1
_PAUSES_S: Final = (0.0, 0.02, 0.05, 0.1, *itertools.repeat(0.2, 20))
"""Before each further attempt: while a slot moves, some of its keys can be reached nowhere."""
_ELSEWHERE: Final = (AskError, TryAgainError)  # a MovedError is an AskError
_PREFIX: Final = "qs:{"


def primary_of_slot(answer: Any, asked: Address, slot: int) -> tuple[Address | None, list[Address]]:
    """From an answer to CLUSTER SLOTS, where the primary of a slot is, and where all nodes are.

    Args:
        asked: The node that has answered, which may not know its own name.
        slot: ANY_SLOT for any primary.
    """
    ranges: Mapping[tuple[int, int], Any] = parse_cluster_slots(answer, current_host=asked[0])
    found, nodes = None, []
    for (first, last), of_range in ranges.items():
        nodes += [_address(of_range["primary"]), *map(_address, of_range["replicas"])]
        if found is None and (slot == ANY_SLOT or first <= slot <= last):
            found = _address(of_range["primary"])
    return found, nodes


def primaries_and_slots(answer: Any, asked: Address) -> tuple[list[Address], int]:
    """From an answer to CLUSTER SLOTS, where all primaries are, and how many slots they have."""
    ranges: Mapping[tuple[int, int], Any] = parse_cluster_slots(answer, current_host=asked[0])
    found = dict.fromkeys(_address(of_range["primary"]) for of_range in ranges.values())
    return list(found), sum(last - first + 1 for first, last in ranges)


def _address(told: Any) -> Address:
    host, port = told[0], told[1]
    return (host.decode() if isinstance(host, bytes) else str(host)), int(port)


def slot_of_command(command: tuple[Any, ...]) -> int:
    """The slot of a command's keys; ANY_SLOT if it has none of ours."""
    for argument in command[1:]:
        text = argument.decode(errors="replace") if isinstance(argument, bytes) else argument
        if isinstance(text, str) and text.startswith(_PREFIX):
            return slot_of(text[len(_PREFIX) : text.index("}")])
    return ANY_SLOT


class ClusterClient(redis.Redis):
    """A synchronous client, which has a client for each slot.

    Args:
        connect: Makes the client for the primary of a slot, or for any primary.
    """

    def __init__(self, connect: Callable[[int], redis.Redis]) -> None:
        self._connect = connect
        self._any = connect(ANY_SLOT)
        self._clients = {ANY_SLOT: self._any}
        super().__init__(connection_pool=self._any.connection_pool)

    def at(self, slot: int) -> redis.Redis:
        """The client for a slot."""
        found = self._clients.get(slot)
        # Two threads may make one each: the one that is not kept closes its connections when it is forgotten.
        return found if found is not None else self._clients.setdefault(slot, self._connect(slot))

    def execute_command(self, *args: Any, **options: Any) -> Any:
        client = self.at(slot_of_command(args))
        for pause_s in _PAUSES_S:
            try:
                return client.execute_command(*args, **options)  # type: ignore[no-untyped-call]
            except _ELSEWHERE as exc:
                if isinstance(exc, MovedError):
                    client.connection_pool.disconnect(
                        inuse_connections=False
                    )  # the next connection looks where the slot is
            except ClusterDownError as exc:
                raise ConnectionError(_down(exc)) from exc
            time.sleep(pause_s)
        raise ConnectionError(_MOVING)

    def pipeline(self, transaction: bool = False, shard_hint: Any = None) -> "_Pipeline":
        return _Pipeline(self)

    def close(self) -> None:
        for client in list(self._clients.values()):
            client.close()


class _Pipeline(redis.client.Pipeline):
    """Commands for any slots, of which those of one slot leave together."""

    def __init__(self, client: ClusterClient) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)
        self._client = client

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = list(self.command_stack)
        self.reset()
        answers: list[Any] = [None] * len(commands)
        for slot, places in _by_slot(commands):
            part = self._client.at(slot).pipeline(transaction=False)
            for place in places:
                args, options = commands[place]
                part.execute_command(*args, **options)  # type: ignore[no-untyped-call]
            for place, answer in zip(places, part.execute(raise_on_error=False), strict=True):
                answers[place] = answer
        for place, answer in enumerate(answers):
            if isinstance(answer, (*_ELSEWHERE, ClusterDownError)):
                args, options = commands[place]
                answers[place] = self._client.execute_command(*args, **options)
            elif isinstance(answer, Exception) and raise_on_error:
                raise answer
        return answers


class AsyncClusterClient(redis.asyncio.Redis):
    """Like `ClusterClient`, for an event loop."""

    def __init__(self, connect: Callable[[int], redis.asyncio.Redis]) -> None:
        self._connect_to = connect
        self._any = connect(ANY_SLOT)
        self._clients = {ANY_SLOT: self._any}
        super().__init__(connection_pool=self._any.connection_pool)

    def at(self, slot: int) -> redis.asyncio.Redis:
        """The client for a slot."""
        found = self._clients.get(slot)
        return found if found is not None else self._clients.setdefault(slot, self._connect_to(slot))

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        client = self.at(slot_of_command(args))
        for pause_s in _PAUSES_S:
            try:
                return await client.execute_command(*args, **options)  # type: ignore[no-untyped-call]
            except _ELSEWHERE as exc:
                if isinstance(exc, MovedError):
                    await client.connection_pool.disconnect(inuse_connections=False)
            except ClusterDownError as exc:
                raise ConnectionError(_down(exc)) from exc
            await asyncio.sleep(pause_s)
        raise ConnectionError(_MOVING)

    def pipeline(self, transaction: bool = False, shard_hint: Any = None) -> "_AsyncPipeline":
        return _AsyncPipeline(self)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        for client in self._clients.values():
            await client.aclose(close_connection_pool)


class _AsyncPipeline(redis.asyncio.client.Pipeline):
    """Like `_Pipeline`, for an event loop; the slots are asked at the same time."""

    def __init__(self, client: AsyncClusterClient) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)
        self._client = client

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands: list[Any] = list(self.command_stack)
        await self.reset()  # type: ignore[no-untyped-call]
        answers: list[Any] = [None] * len(commands)

        async def ask(slot: int, places: list[int]) -> None:
            part = self._client.at(slot).pipeline(transaction=False)
            for place in places:
                args, options = commands[place]
                part.execute_command(*args, **options)
            for place, answer in zip(places, await part.execute(raise_on_error=False), strict=True):
                answers[place] = answer

        await asyncio.gather(*(ask(slot, places) for slot, places in _by_slot(commands)))
        for place, answer in enumerate(answers):
            if isinstance(answer, (*_ELSEWHERE, ClusterDownError)):
                args, options = commands[place]
                answers[place] = await self._client.execute_command(*args, **options)
            elif isinstance(answer, Exception) and raise_on_error:
                raise answer
        return answers


_MOVING: Final = "a slot of the cluster is being moved, and this was not carried out: try again in a moment"


def _down(exc: Exception) -> str:
    return f"a part of the cluster is down ({exc}), and this was not carried out"


def _by_slot(commands: list[Any]) -> Iterator[tuple[int, list[int]]]:
    """The places of the commands of each slot."""
    found: dict[int, list[int]] = {}
    for place, (args, _) in enumerate(commands):
        found.setdefault(slot_of_command(args), []).append(place)
    return iter(found.items())
