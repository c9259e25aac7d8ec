"""How replicas come up: a moving display on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qserve.cli.output import note
from qserve.cli.terminal import terminal
from qserve.deployments.deploying import Goal

_POLL_S = 0.05


def show_progress(goals: Sequence[Goal]) -> None:
    """Show how far the goals are until each has been reached or has failed."""
    if sys.stderr.isatty():
        _show_bars(goals)
    else:
        _show_lines(goals)


def _show_bars(goals: Sequence[Goal]) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed} of {task.total} replicas"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal(), transient=True) as progress:
        tasks = [progress.add_task(goal.name, total=goal.deployed.spec.num_replicas) for goal in goals]
        waiting = dict(zip(tasks, goals, strict=True))
        while waiting:
            for task, goal in list(waiting.items()):
                now = goal.progress()
                progress.update(task, completed=now.ready, total=now.wanted or goal.deployed.spec.num_replicas)
                if now.done or now.deleted:
                    del waiting[task]
            time.sleep(_POLL_S if waiting else 0)


def _show_lines(goals: Sequence[Goal]) -> None:
    shown: dict[str, int] = {}
    waiting = list(goals)
    while waiting:
        for goal in list(waiting):
            now = goal.progress()
            if now.asked and shown.get(goal.name) != now.ready:
                shown[goal.name] = now.ready
                note(f"{goal.name}: {now.ready} of {now.wanted or goal.deployed.spec.num_replicas} replicas are up")
            if now.done or now.deleted:
                waiting.remove(goal)
        time.sleep(_POLL_S if waiting else 0)
