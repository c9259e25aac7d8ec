"""How replicas come up: a moving line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence

from qserve.deployments.deploying import Goal
from qserve.screen.terminal import terminal

_POLL_S = 0.05
_MOST_NAMES = 3


def show_progress(goals: Sequence[Goal]) -> None:
    """Show how far the goals are until each has been reached or has failed."""
    if sys.stderr.isatty():
        _show_line(goals)
    else:
        _show_lines(goals)


def _show_line(goals: Sequence[Goal]) -> None:
    started, waiting = time.monotonic(), {goal.name: goal for goal in goals}
    ready = dict.fromkeys(waiting, 0)
    wanted = {goal.name: goal.deployed.spec.num_replicas for goal in goals}
    with terminal().status("Starting ...") as status:
        while waiting:
            for name, goal in list(waiting.items()):
                now = goal.progress()
                ready[name], wanted[name] = now.ready, now.wanted or wanted[name]
                if now.done or now.deleted:
                    del waiting[name]
            names = ", ".join(list(waiting)[:_MOST_NAMES]) + (", ..." if len(waiting) > _MOST_NAMES else "")
            status.update(
                f"{sum(ready.values())} of {sum(wanted.values())} replicas are up, {time.monotonic() - started:.0f} s"
                + (f"; waiting for {names}" if names else "")
            )
            time.sleep(_POLL_S if waiting else 0)


def _show_lines(goals: Sequence[Goal]) -> None:
    shown: dict[str, int] = {}
    waiting = list(goals)
    while waiting:
        for goal in list(waiting):
            now = goal.progress()
            if now.ready and shown.get(goal.name) != now.ready:
                shown[goal.name] = now.ready
                told = f"{goal.name}: {now.ready} of {now.wanted or goal.deployed.spec.num_replicas} replicas are up"
                sys.stderr.write(told + "\n")
            if now.done or now.deleted:
                waiting.remove(goal)
        time.sleep(_POLL_S if waiting else 0)
