"""What operators do to deployments and to durable calls. All of it is synchronous and takes effect within seconds.

Every function raises `BrokerUnavailable`, `ConfigurationError` or `CommandRefused` where Redis does not do what it is
told.
"""

import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec.structs import asdict, replace
from pydantic import ValidationError

from qserve.broker.history.call_index import ABOVE_ALL, CallSummary, Entry, run_again
from qserve.broker.inboxes import control_frame, tell_now
from qserve.broker.instance.state import GenerationChanged, State
from qserve.broker.records import end_now
from qserve.deployments.deploying import Goal
from qserve.durable.dead_letters import DeadLetters
from qserve.errors import CallCancelled, CallNotFound, DeploymentNotFound
from qserve.operating.call_search import CallFilter, find_calls
from qserve.user_code.source_files import changed_files
from qserve.wire.autoscaling import Autoscaling, AutoscalingConfig
from qserve.wire.call_record import DEAD, FAILED
from qserve.wire.messages import Control, ErrorInfo, encode
from qserve.wire.spec import Deployed, DeploymentSpec


def pause(state: State, name: str, who: str) -> None:
    """Let calls of a deployment be accepted but not run.

    Args:
        who: The operator, as others are told who ask why calls wait.

    Raises:
        DeploymentNotFound: There is none of this name.
    """
    if not state.pause(name, who or "somebody"):
        raise _unknown(name)


def resume(state: State, name: str) -> None:
    """Let calls of a paused deployment run again. Raises `DeploymentNotFound`."""
    if not state.pause(name, ""):
        raise _unknown(name)


def scale(state: State, name: str, replicas: int) -> Goal | None:
    """Give a deployment another number of replicas; None if it has that already.

    Raises:
        DeploymentNotFound: There is none of this name.
        ValueError: Its number follows the load, or all nodes that run it have numbers of their own.
    """
    deployed = _deployed(state, name)
    if deployed.spec.autoscaling is not None:
        bounds = deployed.spec.autoscaling
        raise ValueError(
            f"the number of replicas of {name!r} follows the load, from {bounds.min_replicas} to "
            f"{bounds.max_replicas}: change these two (`qserve scale {name} --min N --max N`), or deploy it without "
            "autoscaling_config"
        )
    nodes = [each for each in state.observed.nodes().values() if not each.only or name in each.only]
    if nodes and all(each.replicas_per_node is not None for each in nodes):
        numbers = ", ".join(sorted(f"{each.replicas_per_node} on {each.host}" for each in nodes))
        raise ValueError(
            f"{name!r} does not get {replicas} replicas by this: each node runs as many as it was started with "
            f"({numbers}). Nothing was changed. Start other nodes, or start these anew with another --replicas-per-node"
        )
    if deployed.spec.num_replicas == replicas:
        return None
    return _change(state, name, lambda spec: replace(spec, num_replicas=replicas))


def scale_between(state: State, name: str, least: int | None, most: int | None) -> Autoscaling:
    """Change between which numbers of replicas a deployment follows the load; returns what holds now.

    Args:
        least, most: None leaves one as it is.

    Raises:
        DeploymentNotFound: There is none of this name.
        ValueError: Its number does not follow the load, or cannot lie between these.
    """
    bounds = _deployed(state, name).spec.autoscaling
    if bounds is None:
        raise ValueError(f"the number of replicas of {name!r} does not follow the load: give it one number instead")
    given = {"min_replicas": least, "max_replicas": most}
    values = asdict(bounds) | {field: value for field, value in given.items() if value is not None}
    if bounds.initial_replicas is not None:
        at_most = min(bounds.initial_replicas, values["max_replicas"])
        values["initial_replicas"] = max(at_most, values["min_replicas"])
    try:
        wanted = Autoscaling(**AutoscalingConfig(**values).model_dump())
    except ValidationError as exc:
        problems = [problem["msg"].removeprefix("Value error, ").rstrip(".") for problem in exc.errors()]
        raise ValueError("; ".join(problems)) from exc
    if wanted != bounds:
        _change(state, name, lambda spec: replace(spec, autoscaling=wanted))
    return wanted


def set_bound(state: State, name: str, bound: int) -> Goal | None:
    """Give the queue of a deployment another bound; None if it has that already. Raises `DeploymentNotFound`."""
    if _deployed(state, name).spec.max_queued_requests == bound:
        return None
    return _change(state, name, lambda spec: replace(spec, max_queued_requests=bound))


class RolledBack(NamedTuple):
    """What came of a `roll_back`.

    Attributes:
        goal: The former version, on its way to being served.
        caveat: A sentence about code that replicas import and that could not be compared; "" if there is none.
    """

    goal: Goal
    caveat: str


def roll_back(state: State, name: str) -> RolledBack:
    """Deploy again what was served before the present version. Done twice, it leads back.

    Raises:
        DeploymentNotFound: There is none of this name.
        ValueError: There was no other version before, or files that its code is imported from are others by now.
    """
    while True:
        current, former = _deployed(state, name), state.former(name)
        if former is None:
            raise ValueError(f"there is no version of {name!r} before the present one")
        caveat = _caveat(state, former, is_served=former.revision == current.spec.revision)
        try:
            deployed = state.deploy(former, expected=current.generation, former=current)
            return RolledBack(Goal(state, deployed, current), caveat)
        except GenerationChanged:
            continue


def _caveat(state: State, former: DeploymentSpec, *, is_served: bool) -> str:
    if former.target.pickled and not former.sources:
        return ""
    changed = changed_files(former.sources)
    if changed is None:
        what = former.target.import_path or "the modules that its pickled code uses"
        return (
            f"Its code was not compared, because that cannot be done from here: replicas import {what} from the files "
            "that are on their machines. If these are newer, put the former ones, or the former image, back there, and "
            "roll back again."
        )
    if changed:
        files = ", ".join(changed[:3]) + (f" and {len(changed) - 3} others" if len(changed) > 3 else "")
        if is_served:
            return f"Its replicas stay, but others that start will import what is in the files now: {files} changed."
        raise ValueError(
            f"the former version of {former.name!r} does not come back by this: replicas import its code from files, "
            f"and since it was deployed these have changed: {files}. Nothing was done. Put the former files, or the "
            f"former image, back where replicas run, and `qserve rollback {former.name}` again, or deploy code that "
            "works"
        )
    elsewhere = sorted({node.host for node in state.observed.nodes().values()} - {socket.gethostname()})
    if not elsewhere:
        return ""
    return (
        f"The files on this machine are those of that version. Replicas on {', '.join(elsewhere)} import the files "
        "there, which were not compared."
    )


def send_again(state: State, call: CallSummary, out_of_line_bytes: int) -> str:
    """Run a durable call again that has failed or is a dead letter; returns its id.

    Raises:
        CallNotFound: It has not ended so, or its arguments are gone.
        DeploymentNotFound: Its deployment is gone.
    """
    if call.state == DEAD:
        letters = DeadLetters(state, out_of_line_bytes)
        return letters.retry(letters.get(call.deployment, call.id))
    said = run_again(state.redis, state.keys, call.deployment, call.id)
    if said == "deleted":
        raise _unknown(call.deployment)
    if said == "ended" and call.state == FAILED:
        raise CallNotFound(f"call {call.id} cannot run again, its arguments are not kept: submit it once more")
    if said != "queued":
        raise CallNotFound(f"call {call.id} cannot run again, it is {call.state}: only failed and dead calls can")
    return call.id


def cancel(state: State, call: CallSummary) -> str:
    """Cancel a durable call; returns "cancelled", "cancelling" where it runs, or "ended" where it has ended before."""
    info = ErrorInfo(CallCancelled.__name__, CallCancelled.__name__, CallCancelled.__module__, "the call was cancelled")
    return end_now(state.redis, state.keys, state.signer, call.id, encode(info))


def failed_calls(state: State, name: str) -> Iterator[CallSummary]:
    """The calls of a deployment that can run again, the newest first."""
    before: Entry | None = ABOVE_ALL
    while before is not None:
        found = find_calls(state, CallFilter((FAILED, DEAD), name, before=before), 1000)
        yield from (call for _, call in found.calls)
        before = found.next_before


def stop_replica(state: State, replica: str) -> bool:
    """Let a replica finish its calls and leave; another takes its place. False if it is gone."""
    return _tell(state, replica, Control("leave"))


def dump_stacks(state: State, replica: str) -> bool:
    """Let a replica note where its threads stand, among the calls that had trouble. False if it is gone."""
    return _tell(state, replica, Control("stacks"))


def _tell(state: State, replica: str, control: Control) -> bool:
    for keys in state.keys.all():
        frame = control_frame(state.signer, replica, control)
        if tell_now(state.redis, keys, replica, frame):
            return True
    return False


def _change(state: State, name: str, change: Callable[[DeploymentSpec], DeploymentSpec]) -> Goal:
    while True:
        current = _deployed(state, name)
        try:
            return Goal(state, state.deploy(change(current.spec), expected=current.generation), current)
        except GenerationChanged:
            continue


def _deployed(state: State, name: str) -> Deployed:
    deployed = state.get(name)
    if deployed is None:
        raise _unknown(name)
    return deployed


def _unknown(name: str) -> DeploymentNotFound:
    return DeploymentNotFound(f"there is no deployment {name!r}: `qserve status` lists those that exist")
