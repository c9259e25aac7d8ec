"""`qserve dead`: what was given up on can be seen and sent again."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from qserve import serve
from qserve.cli.command_line import main
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.gateways import gateway
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

pytestmark = pytest.mark.usefixtures("qserve_instance")


def dead(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["dead", *arguments])


def listed(name: str) -> list[dict[str, Any]]:
    done = dead("ls", "--json", name)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def broken(gate: Gate) -> serve.Deployment[Any]:
    """Fails until the gate is open."""
    path = Path(gate._path)

    @serve.deployment
    def broken(word: str, *, times: int = 1) -> str:
        if not path.exists():
            raise ValueError("not yet")
        return word * times

    broken.deploy()
    dead("drop", "--all", "broken")  # of other tests: letters outlive their deployment
    return broken


def test_a_letter_is_listed_and_shown(broken: Any) -> None:
    ref = broken.get_handle().options(durable=True, retries=1, backoff=0.01).remote("ab", times=2)
    with pytest.raises(ValueError, match="not yet"):
        ref.result(patience(LIMIT_S))

    [letter] = listed("broken")

    assert letter["call"] == ref.id
    assert (letter["durable"], letter["attempts"], letter["reason"]) == (True, 2, "ValueError: not yet")
    assert ref.id in dead("ls").output
    for name in (letter["letter"], ref.id):
        shown = json.loads(dead("show", "broken", name).stdout)
        assert (shown["args"], shown["kwargs"]) == (["ab"], {"times": 2})


def test_a_call_that_is_sent_again_answers_its_own_id(broken: Any, gate: Gate) -> None:
    ref = broken.get_handle().options(durable=True, retries=1, backoff=0.01).remote("ab")
    with pytest.raises(ValueError, match="not yet"):
        ref.result(patience(LIMIT_S))
    gate.open()

    done = dead("retry", "broken", ref.id)

    assert done.stdout.strip() == ref.id, done.output
    assert serve.get_ref(ref.id).result(patience(LIMIT_S)) == "ab"
    assert serve.get_ref(ref.id).status().state == "done"
    assert listed("broken") == []


def test_letters_are_dropped(broken: Any) -> None:
    refs = [broken.get_handle().options(durable=True, retries=1, backoff=0.01).remote("x") for _ in range(2)]
    for ref in refs:
        with pytest.raises(ValueError, match="not yet"):
            ref.result(patience(LIMIT_S))

    assert dead("drop", "broken", refs[0].id).exit_code == 0
    assert [letter["call"] for letter in listed("broken")] == [refs[1].id]
    assert dead("drop", "--all", "broken").exit_code == 0
    assert listed("broken") == []


def test_an_ordinary_call_is_sent_again_as_a_durable_one(
    qserve_instance: TestInstance, notes: Notes, gate: Gate
) -> None:
    path = Path(gate._path)

    @serve.deployment
    def poison() -> str:
        notes.add("ran")
        if not path.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return "fine"

    poison.deploy()
    dead("drop", "--all", "poison")  # of other tests
    with httpx.Client(base_url=qserve_instance.url, timeout=patience(LIMIT_S)) as http:
        assert http.get("/poison").status_code == 500
        [letter] = listed("poison")
        assert not letter["durable"]
        assert json.loads(dead("show", "poison", letter["letter"]).stdout)["request"] == "GET /poison"
        gate.open()

        call_id = dead("retry", "poison", letter["letter"]).stdout.strip()

        assert http.get(f"/-/calls/{call_id}", params={"wait": 20}).json()["response"]["body"] == "fine"
    assert listed("poison") == []


def test_a_letter_that_is_not_there_is_told(broken: Any) -> None:
    done = dead("show", "broken", "1-1")
    assert done.exit_code == 1
    assert "there is no dead letter '1-1' of 'broken'" in done.output
    assert dead("retry", "broken").exit_code == 1


@pytest.fixture
def admin(qserve_instance: TestInstance) -> Iterator[httpx.Client]:
    """A client of a gateway's admin side, with its token."""
    with gateway(qserve_instance.settings, QSERVE_ADMIN_PORT=0, QSERVE_ADMIN_TOKEN="t") as running:
        headers = {"Authorization": "Bearer t"}
        with httpx.Client(base_url=running.admin, headers=headers, timeout=patience(LIMIT_S)) as client:
            yield client


def test_letters_are_seen_and_sent_again_over_http(broken: Any, gate: Gate, admin: httpx.Client) -> None:
    refs = [broken.get_handle().options(durable=True, retries=1, backoff=0.01).remote(word) for word in ("ab", "cd")]
    for ref in refs:
        with pytest.raises(ValueError, match="not yet"):
            ref.result(patience(LIMIT_S))

    assert {letter["call"] for letter in admin.get("/-/dead/broken").json()} == {ref.id for ref in refs}
    assert {ref.id for ref in refs} <= {letter["call"] for letter in admin.get("/-/dead").json()}
    shown = admin.get(f"/-/dead/broken/{refs[0].id}").json()
    assert (shown["args"], shown["attempts"], shown["reason"]) == (["ab"], 2, "ValueError: not yet")
    gate.open()
    sent = admin.post(f"/-/dead/broken/{shown['letter']}/retry")
    assert sent.json() == {"call": refs[0].id, "location": f"/-/calls/{refs[0].id}"}
    assert serve.get_ref(refs[0].id).result(patience(LIMIT_S)) == "ab"
    assert admin.delete(f"/-/dead/broken/{refs[1].id}").status_code == 200
    assert admin.get("/-/dead/broken").json() == []


def test_mistakes_about_letters_are_told_over_http(broken: Any, admin: httpx.Client) -> None:
    assert admin.post("/-/dead/broken/1-1/retry").status_code == 404
    assert admin.delete("/-/dead/broken").status_code == 405
    assert admin.get("/-/dead/broken/1-1/retry").headers["allow"] == "POST"
    assert admin.get("/-/dead/broken/1-1/other").status_code == 404
    assert admin.get("/-/deadly").status_code == 404
