"""What operators do to nodes."""

from qserve.operating import nodes
from qserve.wire.spec import NodeInfo
from qserve_gateway.console.orders import Done, NotPossible, Order


def drain(order: Order) -> Done:
    node = _found(order)
    waiting = nodes.served_nowhere_else(order.state, node)
    nodes.drain(order.state, node, order.who)
    said = f"The replicas on {order.about} finish their calls and leave."
    if waiting:
        said += (
            f" No other node serves {', '.join(waiting[:5])}{' and others' if len(waiting) > 5 else ''}: calls wait."
        )
    return Done(said)


def undrain(order: Order) -> Done:
    nodes.undrain(order.state, _found(order))
    return Done(f"{order.about} runs what is deployed again.")


def _found(order: Order) -> NodeInfo:
    try:
        return nodes.find_node(order.state, order.about)
    except ValueError as exc:
        raise NotPossible(str(exc)) from exc
