"""The lists in which Celery clients put their messages, and the keys in which they look for results.

Both are as Celery's transport and result backend for Redis have them. For the event loop of a Celery worker, so no
command waits for long: all of them go over redis-py, on a client that gives a silent server up after two seconds.
"""

from typing import Any, Final, cast

from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import LEASE, RELEASE
from qserve.broker.server import redis_clients

_PRIORITIES: Final = ("", "\x06\x163", "\x06\x166", "\x06\x169")
"""Ends of the names of the lists, as kombu has them; the first is the most urgent, and what stands in it has none."""
_LEASE_MS: Final = 3000
_ANSWER_S: Final = 2.0
"""A worker has children to look after: it does not wait for a frozen server longer than that."""
_BLOCK_S: Final = 5


class CeleryLists:
    """The lists of one queue, read without taking a message off them. Every method raises as `hold_lease` does.

    Args:
        queue: Name of the queue that Celery clients send to.
        reader: Id of this reader, of which one at a time holds the lease.
    """

    def __init__(self, redis_url: str, keys: Keys, queue: str, reader: str) -> None:
        self._redis = redis_clients.client(keys.at(0).address(redis_url), _ANSWER_S)
        self._names = [f"{keys.celery_prefix}{queue}{priority}" for priority in _PRIORITIES]
        self._lease = f"{keys.celery_prefix}{queue}.reader"
        self._reader = reader
        self._waiting: Any = None

    def close(self) -> None:
        """Close the connections."""
        self.stop_waiting()
        self._redis.close()

    def hold_lease(self) -> bool:
        """Take the lease, or keep it; False while another reader has it.

        Raises:
            BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
        """
        with our_errors(self._redis):
            return bool(LEASE.run(self._redis, (self._lease,), self._reader, _LEASE_MS))

    def release_lease(self) -> None:
        """Let another reader have the lease at once."""
        with our_errors(self._redis):
            RELEASE.run(self._redis, (self._lease,), self._reader)

    def oldest(self, most: int) -> tuple[str, list[bytes]] | None:
        """The name of the most urgent list that is not empty, and its oldest messages in their order; None if all are.

        The messages stay there until `remove` is called.
        """
        with our_errors(self._redis):
            pipeline = self._redis.pipeline(transaction=False)
            for name in self._names:
                pipeline.lrange(name, -most, -1)
            found = zip(self._names, pipeline.execute(), strict=True)
        return next(((name, raws[::-1]) for name, raws in found if raws), None)

    def remove(self, name: str, messages: list[bytes]) -> None:
        """Take messages off a list, for good."""
        with our_errors(self._redis):
            pipeline = self._redis.pipeline(transaction=False)
            for message in messages:
                pipeline.lrem(name, -1, cast("Any", message))  # bytes are fine, whatever redis-py's stubs say
            pipeline.execute()

    # Waiting for the next message

    @property
    def is_waiting(self) -> bool:
        """Whether `wait` was called and nothing has ended that."""
        return self._waiting is not None

    def wait(self) -> int:
        """Have the server say when there is a message in the most urgent list, or after some seconds.

        Returns:
            The file descriptor that can be read then; `take_answer` is to be called.
        """
        urgent = self._names[0]
        with our_errors(self._redis):
            waiting: Any = self._redis.connection_pool.get_connection()
            try:
                # A list that is moved onto itself stays as it is.
                waiting.send_command("BLMOVE", urgent, urgent, "RIGHT", "RIGHT", _BLOCK_S)
            except BaseException:
                self._redis.connection_pool.release(waiting)
                raise
        self._waiting = waiting
        return self.descriptor

    @property
    def descriptor(self) -> int:
        """File descriptor of the connection that waits; -1 if none does."""
        if self._waiting is None or self._waiting._sock is None:
            return -1
        found: int = self._waiting._sock.fileno()
        return found

    def take_answer(self) -> None:
        """Read the answer for which `wait` has waited."""
        waiting, self._waiting = self._waiting, None
        try:
            with our_errors(self._redis):
                waiting.read_response()
        except BaseException:
            waiting.disconnect()
            raise
        finally:
            self._redis.connection_pool.release(waiting)

    def stop_waiting(self) -> None:
        """Give up the connection that waits; harmless if none does."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.disconnect()
            self._redis.connection_pool.release(waiting)


def store_celery_result(client: Any, keys: Keys, task: str, call_id: str, meta: bytes, ttl_ms: int) -> None:
    """Write the end of a task that is no call as Celery's result backend does; raises as `CeleryLists.hold_lease`.

    A task whose call has a record is left alone: its message is read again, and the call has an end of its own.
    """
    key = f"{keys.celery_prefix}celery-task-meta-{task}"
    with our_errors(client):
        if client.exists(keys.call(call_id)):
            return
        client.set(key, meta, px=ttl_ms)
        client.publish(key, meta)
