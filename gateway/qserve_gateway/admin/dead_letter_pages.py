"""Pages about dead letters on the admin listener: what `qserve dead` does, as JSON."""

import re
from urllib.parse import unquote

from qserve.broker.instance.state import State
from qserve.broker.redis_errors import CommandRefused
from qserve.durable.dead_letters import DeadLetters
from qserve.errors import BrokerUnavailable
from qserve.wire.messages import HttpResponse
from qserve_gateway.respond import json_response, text_response

_PATH = re.compile(r"/-/dead(?:/(?P<name>[^/]+)(?:/(?P<letter>[^/]+)(?P<retry>/retry)?)?)?").fullmatch


def answer(state: State, out_of_line_bytes: int, method: str, path: str) -> HttpResponse:
    """Answer a request for a path below /-/dead. It blocks while it waits for Redis.

    Raises:
        CallNotFound, DeploymentNotFound, FrameRejected, BrokerUnavailable: As `DeadLetters` does.
    """
    match = _PATH(path)
    if match is None:
        return text_response(404, "There are /-/dead, /-/dead/NAME, /-/dead/NAME/ID and /-/dead/NAME/ID/retry.")
    name, letter = (unquote(part) if part else "" for part in match.group("name", "letter"))
    allowed = "POST" if match["retry"] else "GET, HEAD, DELETE" if letter else "GET, HEAD"
    if method not in allowed.split(", "):
        return text_response(405, f"Only {allowed}.", (b"allow", allowed.encode()))
    try:
        return json_response(_do(DeadLetters(state, out_of_line_bytes), method, name, letter))
    except CommandRefused as exc:
        raise BrokerUnavailable(f"Redis cannot be asked for dead letters: {exc}") from exc


def _do(letters: DeadLetters, method: str, name: str, letter: str) -> object:
    if not letter:
        return [each.facts() for each in (letters.of(name) if name else letters.all())]
    found = letters.get(name, letter)
    if method == "POST":
        call_id = letters.retry(found)
        return {"call": call_id, "location": f"/-/calls/{call_id}"}
    if method == "DELETE":
        letters.drop(found)
        return {"dropped": found.id}
    return found.facts() | letters.contents(found)
