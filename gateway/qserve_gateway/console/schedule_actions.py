"""What operators do to schedules."""

from qserve.durable.schedules import Schedules, call_of
from qserve.wire.call_record import new_call_id
from qserve_gateway.console.call_actions import submit
from qserve_gateway.console.orders import Done, NotPossible, Order
from qserve_gateway.console.sessions import PATH


def run_now(order: Order) -> Done:
    schedule = Schedules(order.state).get(order.about)
    if schedule is None:
        raise _unknown(order)
    call, options = call_of(schedule, new_call_id(order.state.keys.of(schedule.deployment).shard))
    submit(order, call, options)
    return Done(f"Call {call.id} of {order.about} is submitted.", f"{PATH}/calls/{call.id}")


def pause(order: Order) -> Done:
    if not Schedules(order.state).pause(order.about, order.who):
        raise _unknown(order)
    return Done(f"Schedule {order.about} is paused: what is due meanwhile is left out.")


def resume(order: Order) -> Done:
    if not Schedules(order.state).pause(order.about, ""):
        raise _unknown(order)
    return Done(f"Schedule {order.about} submits calls again.")


def remove(order: Order) -> Done:
    if not Schedules(order.state).remove(order.about):
        raise _unknown(order)
    return Done(f"Schedule {order.about} is removed.")


def _unknown(order: Order) -> NotPossible:
    return NotPossible(f"there is no schedule {order.about!r}")
