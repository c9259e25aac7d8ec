"""What the tests of the console look at: a gateway with a console, and deployments with something to see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from qserve import serve
from qserve.settings import Settings
from tests.support.gateways import gateway
from tests.support.slowness import patience

OPERATOR, VIEWER = "token-of-operators", "token-of-viewers"
PAGES = ("", "/calls", "/troubles", "/dead", "/schedules", "/cluster", "/audit")
EVIL = "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\">"
"""What somebody may call their things who wants to be the operator."""


@contextmanager
def console_of(settings: Settings, **variables: object) -> Iterator[str]:
    """The URL of the console of a gateway of its own."""
    given = {"QSERVE_ADMIN_PORT": 0, "QSERVE_ADMIN_TOKEN": OPERATOR, "QSERVE_CONSOLE_VIEWER_TOKEN": VIEWER}
    with gateway(settings, **{**given, **variables}) as running:
        yield f"{running.admin}/-/console"


@contextmanager
def visitor(url: str, token: str = "", **headers: str) -> Iterator[httpx.Client]:
    """Somebody with a browser, who has logged in if they have a token."""
    with httpx.Client(base_url=url, timeout=patience(30), headers=headers) as client:
        if token:
            answer = client.post("/login", data={"token": token, "back": "/-/console"})
            assert answer.status_code == 303, answer.text
        yield client


def act(client: httpx.Client, action: str, about: str = "", **fields: Any) -> httpx.Response:
    """Do something, as the form of a page does after it was confirmed."""
    form = {"action": action, "about": about, "back": "/-/console", "confirmed": "yes", **fields}
    return client.post("/act", data=form, follow_redirects=True)


def deploy_shop() -> None:
    """Deployments with calls that end in every way; the names are those that pages show."""

    @serve.deployment(name="shop", version="first")
    def shop(word: str = "", password: str = "") -> str:
        if word == "far":
            serve.get_replica_context().report_progress({"done": 41, "of": 42})
        if word.startswith("bad"):
            raise ValueError(word)
        return f"<b>{word}</b>"

    shop.deploy()
