"""What operators do to nodes: letting one run nothing, so that its machine can be worked on, and letting it go on."""

from qserve.broker.instance.drained_nodes import drain_node
from qserve.broker.instance.state import State
from qserve.wire.spec import NodeInfo


def find_node(state: State, name: str) -> NodeInfo:
    """The live node of a name: HOST, or HOST:PID where several run on a host.

    Raises:
        ValueError: There is none, or more than one.
    """
    nodes = sorted(state.observed.nodes().values(), key=place_of)
    found = [node for node in nodes if name in (node.host, place_of(node))]
    if len(found) == 1:
        return found[0]
    places = ", ".join(map(place_of, found or nodes))
    if found:
        raise ValueError(f"there are several nodes on {name[:80]!r}: name one of {places}")
    raise ValueError(f"there is no node {name[:80]!r}; those that live: {places or 'none'}")


def place_of(node: NodeInfo) -> str:
    """HOST:PID of a node."""
    return f"{node.host}:{node.pid}"


def drain(state: State, node: NodeInfo, who: str) -> None:
    """Let the replicas of a node finish their calls and leave. It runs nothing until `undrain`, or until it ends."""
    drain_node(state.redis, state.keys, node.id, who or "somebody")


def undrain(state: State, node: NodeInfo) -> None:
    """Let a node run what is deployed again."""
    drain_node(state.redis, state.keys, node.id, "")


def replicas_on(state: State, node: NodeInfo) -> int:
    """How many replicas run on a node."""
    return sum(info.node == node.id for name in state.names() for info in state.observed.replicas(name).values())


def served_nowhere_else(state: State, node: NodeInfo) -> list[str]:
    """Deployments whose calls would only wait if this node ran nothing."""
    others = [each for each in state.observed.nodes().values() if each.id != node.id and not each.drained]
    names = [name for name in state.names() if not node.only or name in node.only]
    return [name for name in names if not any(not each.only or name in each.only for each in others)]
