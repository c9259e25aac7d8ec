"""The calls of schedules in Redis: one for each moment, whoever submits it."""

import msgspec

from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.payloads import Payloads
from qserve.durable.schedules import Plan, Schedules
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions
from qserve.wire.codec import Codec
from qserve.wire.messages import Signer
from tests.support.calling import deploy


def test_two_schedulers_that_see_the_same_moment_submit_one_call(
    settings: Settings, keys: Keys, signer: Signer, state: State
) -> None:
    deploy(settings)
    one, two = Schedules(state), Schedules(State(settings.redis_url, keys, signer))
    made = one.put(
        Plan("s", "every 1h", "Echo", "", DurableOptions(), (), {}), Codec(allow_pickle=False, max_bytes=1000)
    )
    one.write(msgspec.structs.replace(made, created=made.created - 7_200_000))
    payloads = Payloads(keys, signer, 1000)
    for each in (one, two):
        each.fire_due(payloads)
        state.redis.hdel(keys.fired, "s")  # not noted yet
    assert state.redis.xlen(keys.calls("Echo")) == 1
    two._redis.close()
