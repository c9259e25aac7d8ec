"""What operators do to durable calls and dead letters."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.durable.dead_letters import DeadLetters
from qserve.errors import BrokerUnavailable, CallNotFound, ConfigurationError, QServeError
from qserve.operating import controls
from qserve.operating.call_search import CallFilter, find_call, find_calls
from qserve.wire.call_record import DEAD, FAILED, DurableCall, DurableOptions
from qserve_gateway.console.orders import MOST_AT_ONCE, Done, NotPossible, Order, result
from qserve_gateway.console.pages import SINCE


def retry(order: Order) -> Done:
    return _each(order, _chosen(order), "sent again", _retry_one)


def retry_matching(order: Order) -> Done:
    state, since = order.text("filter-state"), order.text("filter-since")
    if since not in SINCE:
        raise NotPossible(f"there is no time {since[:40]!r}")
    wanted = CallFilter(
        (state,) if state else (FAILED, DEAD),
        deployment=order.text("filter-deployment"),
        method=order.text("filter-method"),
        error=order.text("filter-error"),
        key=order.text("filter-key"),
        since=time.time() - SINCE[since] if since else 0.0,
    )
    try:
        found = find_calls(order.state, wanted, MOST_AT_ONCE).calls
    except ValueError as exc:
        raise NotPossible(str(exc)) from exc
    return _each(order, [call.id for _, call in found], "sent again", _retry_one)


def cancel(order: Order) -> Done:
    return _each(order, _chosen(order), "cancelled", _cancel_one)


def retry_letters(order: Order) -> Done:
    return _letters(order, "sent again", DeadLetters.retry)


def drop_letters(order: Order) -> Done:
    return _letters(order, "dropped", DeadLetters.drop)


def submit(order: Order, call: DurableCall, options: DurableOptions) -> None:
    """Submit a call that nobody here waits for; raises as `submit_now` does."""
    state = order.state
    payloads = Payloads(state.keys, state.signer, order.settings.out_of_line_bytes)
    submit_now(state.redis, state.keys, state.signer, payloads, call, options)


def _chosen(order: Order) -> Sequence[str]:
    return order.ids or ([order.about] if order.about else [])


def _retry_one(order: Order, call: Any) -> object:
    return controls.send_again(order.state, call, order.settings.out_of_line_bytes)


def _cancel_one(order: Order, call: Any) -> None:
    if controls.cancel(order.state, call) == "ended":
        raise CallNotFound(f"call {call.id} has ended already")


def _each(order: Order, ids: Sequence[str], said: str, act: Callable[[Order, Any], object]) -> Done:
    if not ids:
        raise NotPossible("no call is selected")
    failures = []
    for call_id in ids:
        try:
            act(order, find_call(order.state, call_id))
        except (BrokerUnavailable, ConfigurationError):
            raise  # it is none of this call alone
        except QServeError as exc:
            failures.append(str(exc))
    if len(failures) == len(ids):
        raise NotPossible(failures[0])
    return Done(result(len(ids) - len(failures), "call", said, failures))


def _letters(order: Order, said: str, act: Callable[[DeadLetters, Any], object]) -> Done:
    letters = DeadLetters(order.state, order.settings.out_of_line_bytes)
    wanted = set(order.ids)
    if not wanted:
        raise NotPossible("no dead letter is selected")
    found = [letter for letter in letters.of(order.about) if letter.id in wanted]
    failures = ["it is not there any more"] * (len(wanted) - len(found))
    for letter in found:
        try:
            act(letters, letter)
        except QServeError as exc:
            failures.append(str(exc))
    if len(failures) == len(wanted):
        raise NotPossible(failures[0])
    return Done(result(len(wanted) - len(failures), "dead letter", said, failures))
