"""Which replicas leave, and which are let in their place. Pure: decided from what is known of them."""

from qserve.wire.spec import SERVING, STANDBY
from qserve_workers.pool.crew import Crew, TrackedReplica


def batch_of(wanted: int) -> int:
    """How many of so many replicas change at once."""
    return max(1, wanted // 5)


def leave_after(crew: Crew, wanted: int) -> list[TrackedReplica]:
    """The old ones to stop when new ones are constructed first; pairs each new one with those it replaces."""
    if crew.desired is None:
        return crew.old
    fresh, old = crew.fresh, crew.old
    leaving = [r for r in old if not r.has_capacity]
    serving_old = [r for r in old if r.has_capacity]
    covered = sum(r.has_capacity for r in fresh)
    for replica in fresh:
        if replica.state == STANDBY and replica.predecessors is None:
            covered += 1
            keep = max(0, wanted - covered)
            gone, serving_old = serving_old[: len(serving_old) - keep], serving_old[-keep:] if keep else []
            leaving += gone
            # Those stopped earlier for a replacement that died before its turn still have to go first.
            replica.predecessors = {r.pid for r in gone} | crew.orphaned
    if covered:
        surplus = len(serving_old) - max(0, wanted - covered)
        leaving += serving_old[: max(0, surplus)]
    return leaving


def leave_first(crew: Crew, wanted: int, *, gave_up: bool) -> list[TrackedReplica]:
    """The old ones to stop when there is no room for old and new at once.

    Args:
        gave_up: The new revision does not come up, so the old ones stay.
    """
    old = crew.old
    leaving = [r for r in old if not r.has_capacity]
    serving_old = [r for r in old if r.has_capacity]
    if not gave_up:
        changing = max(0, wanted - sum(r.has_capacity for r in crew.live))
        leaving += serving_old[: max(0, batch_of(wanted) - changing, len(serving_old) - wanted)]
    for replica in crew.fresh:  # constructed as standby under an earlier, surging generation
        if replica.state == STANDBY and replica.predecessors is None:
            replica.predecessors = crew.orphaned
    return leaving


def excess(crew: Crew, wanted: int, *, is_scaled: bool) -> list[TrackedReplica]:
    """Replicas of the newest revision beyond the wanted number: those not serving first, then the youngest.

    Args:
        is_scaled: Those that serve leave when they are idle; see `releases`.
    """
    fresh = crew.fresh
    youngest_first = [r for r in fresh[::-1] if not (is_scaled and r.state == SERVING)]
    return sorted(youngest_first, key=lambda r: r.state == SERVING)[: max(0, len(fresh) - wanted)]


def releases(crew: Crew, wanted: int) -> list[TrackedReplica]:
    """Whom to let go where replicas are scaled: those that seem idle first, then the youngest, each in its turn."""
    serving = [r for r in crew.fresh if r.state == SERVING]
    too_many = len(serving) - wanted - sum(r.released for r in serving)
    staying = sorted((r for r in serving[::-1] if not r.released), key=lambda r: (r.running > 0, r.refusals))
    return staying[: max(0, too_many)]


def next_to_apply(crew: Crew, wanted: int) -> list[TrackedReplica]:
    """Whose turn it is to reconfigure: a few at a time, the others serve meanwhile."""
    generation, live = crew.generation, crew.live
    busy = sum(r.told_to_apply == generation and r.applied < generation for r in live)
    asking = [r for r in live if r.asks_for == generation and r.told_to_apply < generation]
    return asking[: max(0, batch_of(wanted) - busy)]
