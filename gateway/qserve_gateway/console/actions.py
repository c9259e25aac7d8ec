"""The actions of the console. Every one of them is written into the audit, with what came of it."""

from collections.abc import Callable
from typing import Final, NamedTuple

from qserve.broker.history.audit import note_deed
from qserve.broker.instance.state import State
from qserve.broker.redis_errors import CommandRefused
from qserve.errors import QServeError
from qserve.settings import Settings
from qserve_gateway.console import call_actions, deployment_actions, node_actions, schedule_actions
from qserve_gateway.console.orders import Done, Form, NotPossible, Order
from qserve_gateway.console.sessions import Visitor


class Action(NamedTuple):
    """One thing that can be done.

    Attributes:
        label: As buttons say it.
        question: What is asked before; {about} stands for what it is done to.
    """

    label: str
    question: str
    run: Callable[[Order], Done]


class Actions:
    """Does what operators ask for. Everything here blocks on Redis."""

    def __init__(self, state: State, settings: Settings) -> None:
        self._state = state
        self._settings = settings

    def run(self, visitor: Visitor, name: str, about: str, form: Form) -> Done:
        """Do it, and write it into the audit.

        Raises:
            NotPossible: It makes no sense.
            QServeError, CommandRefused: It failed.
        """
        said = "failed"
        try:
            done = ACTIONS[name].run(Order(self._state, self._settings, visitor.name, about, form))
            said = done.said
        except (NotPossible, QServeError, CommandRefused) as exc:
            said = f"failed: {exc}"
            raise
        finally:
            note_deed(self._state.redis, self._state.keys, visitor.name, name, _listed(about, form), said)
        return done


ACTIONS: Final = {
    "pause": Action(
        "Pause", "Pause {about}? Calls are accepted, but wait until it is resumed.", deployment_actions.pause
    ),
    "resume": Action("Resume", "Let calls of {about} run again?", deployment_actions.resume),
    "scale": Action("Set replicas", "Change the number of replicas of {about}?", deployment_actions.scale),
    "scale-between": Action(
        "Set range", "Change how few and how many replicas {about} may have?", deployment_actions.scale_between
    ),
    "bound": Action("Set bound", "Change the bound of the queue of {about}?", deployment_actions.bound),
    "rollback": Action(
        "Roll back",
        "Deploy {about} again as its former version was? Replicas import code that is not pickled from the files that "
        "are on their machines now: put the former files, or the former image, back there first.",
        deployment_actions.roll_back,
    ),
    "delete": Action("Delete", "Delete {about}? Calls that wait get an error.", deployment_actions.delete),
    "call": Action("Call", "Call {about}?", deployment_actions.call),
    "stop-replica": Action(
        "Stop replica", "Let this replica of {about} finish its calls and leave?", deployment_actions.stop_replica
    ),
    "stacks": Action(
        "Dump stacks", "Let this replica of {about} note where its threads stand?", deployment_actions.stacks
    ),
    "retry": Action("Run again", "Run these calls again?", call_actions.retry),
    "retry-matching": Action("Run all again", "Run all calls again that match?", call_actions.retry_matching),
    "cancel": Action("Cancel", "Cancel these calls?", call_actions.cancel),
    "retry-letters": Action("Send again", "Send these calls of {about} again?", call_actions.retry_letters),
    "drop-letters": Action("Drop", "Forget these dead letters of {about}?", call_actions.drop_letters),
    "run-schedule": Action("Run now", "Submit the call of schedule {about} now?", schedule_actions.run_now),
    "pause-schedule": Action(
        "Pause", "Pause schedule {about}? What is due meanwhile is left out.", schedule_actions.pause
    ),
    "resume-schedule": Action("Resume", "Let schedule {about} submit calls again?", schedule_actions.resume),
    "remove-schedule": Action("Remove", "Remove schedule {about}?", schedule_actions.remove),
    "drain": Action(
        "Drain", "Let the replicas on {about} finish their calls and leave, and start none there?", node_actions.drain
    ),
    "undrain": Action("Let it run again", "Let {about} run what is deployed again?", node_actions.undrain),
}
"""Every action by the name that forms and the audit use."""


def _listed(about: str, form: Form) -> str:
    ids = form.get("id", [])
    if not ids:
        return about
    return f"{about} {len(ids)} selected: {', '.join(ids[:5])}".strip()
