"""What operators do from the console. Every action is written into the audit, with what came of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from qserve.broker.history.audit import note_deed
from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.broker.redis_errors import CommandRefused
from qserve.deployments.deploying import delete
from qserve.durable.dead_letters import DeadLetters
from qserve.durable.schedules import Schedules, call_of
from qserve.errors import CallNotFound, QServeError
from qserve.operating import controls
from qserve.operating.call_search import CallFilter, find_call, find_calls
from qserve.settings import Settings
from qserve.wire.call_record import DEAD, FAILED, NEVER_MS, DurableCall, DurableOptions, Terms, new_call_id
from qserve.wire.codec import Codec
from qserve.wire.messages import PYTHON
from qserve_gateway.console.sessions import PATH, Visitor

MOST_AT_ONCE: Final = 1_000
_LARGEST_REPLICAS, _LARGEST_BOUND = 1_000, 10_000_000

Form = Mapping[str, Sequence[str]]


class NotPossible(Exception):
    """The action makes no sense; the text says why."""


class Done(NamedTuple):
    """What came of an action.

    Attributes:
        said: A sentence.
        place: Where to go now; "" for where the form was.
    """

    said: str
    place: str = ""


class Action(NamedTuple):
    """One thing that can be done.

    Attributes:
        label: As buttons say it.
        question: What is asked before; {about} stands for what it is done to.
    """

    label: str
    question: str
    run: Callable[["Actions", str, Form], Done]


class Actions:
    """Does what operators ask for. Everything here blocks on Redis."""

    def __init__(self, state: State, settings: Settings) -> None:
        self._state = state
        self._settings = settings
        self._codec = Codec(allow_pickle=False, max_bytes=settings.max_value_bytes)

    def run(self, visitor: Visitor, name: str, about: str, form: Form) -> Done:
        """Do it, and write it into the audit.

        Raises:
            NotPossible: It makes no sense.
            QServeError, CommandRefused: It failed.
        """
        action = ACTIONS[name]
        said = "failed"
        try:
            done = action.run(self, about, form)
            said = done.said
        except (NotPossible, QServeError, CommandRefused) as exc:
            said = f"failed: {exc}"
            raise
        finally:
            note_deed(self._state.redis, self._state.keys, visitor.name, name, _listed(about, form), said)
        return done

    def pause(self, about: str, _: Form) -> Done:
        controls.pause(self._state, about, paused=True)
        return Done(f"{about} is paused: calls are accepted and wait.")

    def resume(self, about: str, _: Form) -> Done:
        controls.pause(self._state, about, paused=False)
        return Done(f"{about} runs its calls again.")

    def scale(self, about: str, form: Form) -> Done:
        replicas = _number(form, "replicas", _LARGEST_REPLICAS)
        try:
            goal = controls.scale(self._state, about, replicas)
        except ValueError as exc:
            raise NotPossible(str(exc)) from exc
        return Done(f"{about} is to have {replicas} replicas." if goal else f"{about} has {replicas} replicas already.")

    def bound(self, about: str, form: Form) -> Done:
        bound = _number(form, "bound", _LARGEST_BOUND)
        controls.set_bound(self._state, about, bound)
        return Done(f"The queue of {about} takes {bound:,} calls at most.")

    def roll_back(self, about: str, _: Form) -> Done:
        try:
            controls.roll_back(self._state, about)
        except ValueError as exc:
            raise NotPossible(str(exc)) from exc
        return Done(f"The former version of {about} is being rolled out.")

    def delete(self, about: str, _: Form) -> Done:
        delete(self._state, about)
        return Done(f"{about} is deleted.", PATH)

    def call(self, about: str, form: Form) -> Done:
        args, kwargs = _json(form, "args", []), _json(form, "kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise NotPossible("positional arguments are a JSON list, and named ones a JSON object")
        payload = self._codec.pack_call(tuple(args), kwargs, "the call")
        call_id = new_call_id()
        method = _text(form, "method").replace("__call__", "")
        made = DurableCall(*(call_id, about, "", NEVER_MS, PYTHON, method, False, payload), terms=Terms())
        self._submit(made, DurableOptions())
        return Done(f"Call {call_id} is submitted.", f"{PATH}/calls/{call_id}")

    def stop_replica(self, about: str, form: Form) -> Done:
        if not controls.stop_replica(self._state, _text(form, "replica")):
            raise NotPossible("there is no such replica any more")
        return Done(f"A replica of {about} finishes its calls and leaves; another takes its place.")

    def stacks(self, about: str, form: Form) -> Done:
        if not controls.dump_stacks(self._state, _text(form, "replica")):
            raise NotPossible("there is no such replica any more")
        return Done(
            f"The replica of {about} notes where its threads stand; it shows here within seconds.",
            f"{PATH}/troubles?what=stacks&deployment={about}",
        )

    def retry(self, about: str, form: Form) -> Done:
        return self._each(about, form, "sent again", self._retry_one)

    def retry_matching(self, _: str, form: Form) -> Done:
        wanted = CallFilter(
            (FAILED, DEAD) if not _text(form, "filter-state") else (_text(form, "filter-state"),),
            deployment=_text(form, "filter-deployment"),
            method=_text(form, "filter-method"),
            error=_text(form, "filter-error"),
        )
        try:
            found = find_calls(self._state, wanted, MOST_AT_ONCE).calls
        except ValueError as exc:
            raise NotPossible(str(exc)) from exc
        return self._each("", {"id": [call.id for _, call in found]}, "sent again", self._retry_one)

    def cancel(self, about: str, form: Form) -> Done:
        return self._each(about, form, "cancelled", lambda call: controls.cancel(self._state, call))

    def retry_letters(self, about: str, form: Form) -> Done:
        letters = DeadLetters(self._state, self._settings.out_of_line_bytes)
        return self._letters(about, form, "sent again", letters.retry)

    def drop_letters(self, about: str, form: Form) -> Done:
        letters = DeadLetters(self._state, self._settings.out_of_line_bytes)
        return self._letters(about, form, "dropped", letters.drop)

    def run_schedule(self, about: str, _: Form) -> Done:
        schedule = Schedules(self._state).get(about)
        if schedule is None:
            raise NotPossible(f"there is no schedule {about!r}")
        call, options = call_of(schedule, new_call_id())
        self._submit(call, options)
        return Done(f"Call {call.id} of {about} is submitted.", f"{PATH}/calls/{call.id}")

    def remove_schedule(self, about: str, _: Form) -> Done:
        if not Schedules(self._state).remove(about):
            raise NotPossible(f"there is no schedule {about!r}")
        return Done(f"Schedule {about} is removed.")

    def _submit(self, call: DurableCall, options: DurableOptions) -> None:
        payloads = Payloads(self._state.keys, self._state.signer, self._settings.out_of_line_bytes)
        submit_now(self._state.redis, self._state.keys, self._state.signer, payloads, call, options)

    def _retry_one(self, call: Any) -> None:
        controls.send_again(self._state, call, self._settings.out_of_line_bytes)

    def _each(self, about: str, form: Form, said: str, act: Callable[[Any], object]) -> Done:
        ids = form.get("id", [])[:MOST_AT_ONCE] or ([about] if about else [])
        if not ids:
            raise NotPossible("no call is selected")
        failures = []
        for call_id in ids:
            try:
                act(find_call(self._state, call_id))
            except CallNotFound as exc:
                failures.append(str(exc))
        if len(failures) == len(ids):
            raise NotPossible(failures[0])
        return Done(_result(len(ids) - len(failures), "call", said, failures))

    def _letters(self, about: str, form: Form, said: str, act: Callable[[Any], object]) -> Done:
        letters = DeadLetters(self._state, self._settings.out_of_line_bytes)
        ids = form.get("id", [])[:MOST_AT_ONCE]
        if not ids:
            raise NotPossible("no dead letter is selected")
        wanted = set(ids)
        found = [letter for letter in letters.of(about) if letter.id in wanted]
        failures = ["it is not there any more"] * (len(wanted) - len(found))
        for letter in found:
            try:
                act(letter)
            except QServeError as exc:
                failures.append(str(exc))
        if len(failures) == len(wanted):
            raise NotPossible(failures[0])
        return Done(_result(len(wanted) - len(failures), "dead letter", said, failures))


ACTIONS: Final = {
    "pause": Action("Pause", "Pause {about}? Calls are accepted, but wait until it is resumed.", Actions.pause),
    "resume": Action("Resume", "Let calls of {about} run again?", Actions.resume),
    "scale": Action("Set replicas", "Change the number of replicas of {about}?", Actions.scale),
    "bound": Action("Set bound", "Change the bound of the queue of {about}?", Actions.bound),
    "rollback": Action("Roll back", "Serve the former version of {about} again?", Actions.roll_back),
    "delete": Action("Delete", "Delete {about}? Calls that wait get an error.", Actions.delete),
    "call": Action("Call", "Call {about}?", Actions.call),
    "stop-replica": Action(
        "Stop replica", "Let this replica of {about} finish its calls and leave?", Actions.stop_replica
    ),
    "stacks": Action("Dump stacks", "Let this replica of {about} note where its threads stand?", Actions.stacks),
    "retry": Action("Run again", "Run these calls again?", Actions.retry),
    "retry-matching": Action("Run all again", "Run all calls again that match?", Actions.retry_matching),
    "cancel": Action("Cancel", "Cancel these calls?", Actions.cancel),
    "retry-letters": Action("Send again", "Send these calls of {about} again?", Actions.retry_letters),
    "drop-letters": Action("Drop", "Forget these dead letters of {about}?", Actions.drop_letters),
    "run-schedule": Action("Run now", "Submit the call of schedule {about} now?", Actions.run_schedule),
    "remove-schedule": Action("Remove", "Remove schedule {about}?", Actions.remove_schedule),
}
"""Every action by the name that forms and the audit use."""


def _result(count: int, what: str, said: str, failures: Sequence[str]) -> str:
    text = f"{count} {what}{'s' if count != 1 else ''} {said}."
    return text if not failures else f"{text} {len(failures)} left as they are: {failures[0]}"


def _listed(about: str, form: Form) -> str:
    ids = form.get("id", [])
    if not ids:
        return about
    return f"{about} {len(ids)} selected: {', '.join(ids[:5])}".strip()


def _text(form: Form, name: str) -> str:
    return (form.get(name) or [""])[-1].strip()


def _number(form: Form, name: str, most: int) -> int:
    text = _text(form, name)
    if not text.isdecimal() or not 1 <= int(text[:12]) <= most:
        raise NotPossible(f"{name} must be a number from 1 to {most:,}, not {text[:40]!r}")
    return int(text)


def _json(form: Form, name: str, default: Any) -> Any:
    text = _text(form, name)
    try:
        return json.loads(text) if text else default
    except ValueError as exc:
        raise NotPossible(f"{name} is no JSON: {exc}") from exc
