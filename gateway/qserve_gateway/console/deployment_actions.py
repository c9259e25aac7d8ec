"""What operators do to deployments and their replicas."""

from typing import Final

from qserve.deployments import deploying
from qserve.operating import controls
from qserve.wire.call_record import NEVER_MS, DurableCall, DurableOptions, Terms, new_call_id
from qserve.wire.codec import Codec
from qserve.wire.messages import PYTHON
from qserve_gateway.console.call_actions import submit
from qserve_gateway.console.orders import Done, NotPossible, Order
from qserve_gateway.console.sessions import PATH

_LARGEST_REPLICAS: Final = 1_000
_LARGEST_BOUND: Final = 10_000_000


def pause(order: Order) -> Done:
    controls.pause(order.state, order.about, order.who)
    return Done(f"{order.about} is paused: calls are accepted and wait.")


def resume(order: Order) -> Done:
    controls.resume(order.state, order.about)
    return Done(f"{order.about} runs its calls again.")


def scale(order: Order) -> Done:
    replicas = order.number("replicas", _LARGEST_REPLICAS)
    try:
        goal = controls.scale(order.state, order.about, replicas)
    except ValueError as exc:
        raise NotPossible(str(exc)) from exc
    said = f"is to have {replicas} replicas" if goal else f"has {replicas} replicas already"
    return Done(f"{order.about} {said}.")


def scale_between(order: Order) -> Done:
    least, most = order.number("least", _LARGEST_REPLICAS, 0), order.number("most", _LARGEST_REPLICAS)
    try:
        controls.scale_between(order.state, order.about, least, most)
    except ValueError as exc:
        raise NotPossible(str(exc)) from exc
    return Done(f"{order.about} is to have from {least} to {most} replicas, as the load asks for.")


def bound(order: Order) -> Done:
    bound = order.number("bound", _LARGEST_BOUND)
    controls.set_bound(order.state, order.about, bound)
    return Done(f"The queue of {order.about} takes {bound:,} calls at most.")


def roll_back(order: Order) -> Done:
    try:
        caveat = controls.roll_back(order.state, order.about).caveat
    except ValueError as exc:
        raise NotPossible(str(exc)) from exc
    return Done(f"The former version of {order.about} is being rolled out. {caveat}".rstrip())


def delete(order: Order) -> Done:
    if order.about not in order.state.names():
        raise NotPossible(f"there is no deployment {order.about!r}")
    deploying.delete(order.state, order.about)
    return Done(f"{order.about} is deleted.", PATH)


def call(order: Order) -> Done:
    args, kwargs = order.json("args", []), order.json("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise NotPossible("positional arguments are a JSON list, and named ones a JSON object")
    codec = Codec(allow_pickle=False, max_bytes=order.settings.max_value_bytes)
    payload = codec.pack_call(tuple(args), kwargs, "the call")
    call_id = new_call_id(order.state.keys.of(order.about).shard)
    method = order.text("method").replace("__call__", "")
    made = DurableCall(*(call_id, order.about, "", NEVER_MS, PYTHON, method, False, payload), terms=Terms())
    submit(order, made, DurableOptions())
    return Done(f"Call {call_id} is submitted.", f"{PATH}/calls/{call_id}")


def stop_replica(order: Order) -> Done:
    if not controls.stop_replica(order.state, order.text("replica")):
        raise NotPossible("there is no such replica any more")
    return Done(f"A replica of {order.about} finishes its calls and leaves; another takes its place.")


def stacks(order: Order) -> Done:
    if not controls.dump_stacks(order.state, order.text("replica")):
        raise NotPossible("there is no such replica any more")
    return Done(
        f"The replica of {order.about} notes where its threads stand; it shows here within seconds.",
        f"{PATH}/troubles?what=stacks&deployment={order.about}",
    )
