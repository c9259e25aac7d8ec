"""The console in a real browser: every page, what people click and press there, and what must not happen to them.

Where there is no Chromium these tests are skipped; `make browser` installs it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qserve import serve
from qserve.testing import TestInstance
from tests.instance.console.served import EVIL, OPERATOR, VIEWER
from tests.support.browser import Browser, browser, chromium
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="there is no Chromium here, so what the browser does is not tested: `make browser`"
)

PICTURES = os.environ.get("QSERVE_TEST_PICTURES")
"""The folder for the pictures of docs/console.md; `make browser` sets it."""


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        found.look()
        yield found


def log_in(tab: Browser, console: str, token: str) -> None:
    tab.forget()
    tab.open(console)
    tab.wait("document.querySelector('input[name=token]')")
    tab.run("document.querySelector('input[name=token]').focus()")
    tab.type(token)
    tab.press("Enter")
    tab.wait("document.querySelector('.role')")


def confirm(tab: Browser, selector: str) -> None:
    tab.run("window.isBefore = true")
    tab.click(selector)
    tab.wait("document.querySelector('#confirm[open]')")
    tab.click("#confirm button[value=yes]")
    tab.wait("!window.isBefore && document.querySelector('.toast') && document.readyState === 'complete'")


def picture(tab: Browser, name: str) -> None:
    tab.wait("document.querySelector('.dot.on')")
    if PICTURES:
        tab.picture(Path(PICTURES) / f"{name}.png")


def test_what_users_wrote_is_text_on_every_page(shop: Any, console: str, tab: Browser) -> None:
    log_in(tab, console, OPERATOR)
    failed = shop.remote(f"bad {EVIL}", password="hunter2")
    dead = (
        serve.get_deployment("shop").get_handle().options(durable=True, retries=1, backoff=0.01).remote(f"bad {EVIL}")
    )
    done = shop.remote(EVIL)
    for ref in (failed, dead):
        with pytest.raises(ValueError, match="bad"):
            ref.result(patience(LIMIT_S))
    done.result(patience(LIMIT_S))
    ordinary = serve.get_deployment("shop").get_handle().remote(f"bad {EVIL}")
    with pytest.raises(ValueError, match="bad"):
        ordinary.result(patience(LIMIT_S))
    tab.complaints.clear()
    tab.requested.clear()

    for path, shown in (
        ("", "shop"),
        ("/deployments/shop", "Replicas"),
        ("/calls", "<script>"),
        (f"/calls/{failed.id}", "<script>"),
        (f"/calls/{done.id}", "<script>"),
        (f"/calls/{dead.id}", "waits to run again"),
        ("/dead", "<script>"),
        ("/schedules", "schedules"),
        ("/cluster", "Gateways"),
        ("/audit", "Audit"),
    ):
        tab.open(console + path)
        tab.wait(f"document.body.innerText.includes({shown!r})")
        assert tab.run("document.title").endswith("qserve"), path
        assert "hunter2" not in tab.text()
    tab.open(console + "/troubles?deployment=shop")
    tab.wait("document.body.innerText.includes('<script>')")
    tab.open(f"{console}/calls?error=%3Cscript%3Ealert(1)%3C/script%3E&deployment=%22%3E%3Cimg%20src=x%3E")
    tab.wait("document.querySelector('input[name=error]').value.startsWith('<script>')")

    assert tab.run("document.title").endswith("qserve")
    assert tab.complaints == []
    assert [url for url in tab.requested if not url.startswith(console.removesuffix("/-/console"))] == []
    assert [url for url in tab.requested if OPERATOR in url] == []
    assert OPERATOR not in tab.run("document.documentElement.outerHTML + document.cookie")
    [cookie] = [each for each in tab.cookies() if each["name"] == "qserve_console"]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")


def test_an_operator_acts_by_mouse_and_by_keys(shop: Any, console: str, tab: Browser) -> None:
    log_in(tab, console, OPERATOR)
    tab.open(console + "/deployments/shop")
    tab.wait("document.querySelector('.uplot canvas')")
    confirm(tab, "form[data-ask^='Pause'] button")
    assert "shop is paused" in tab.text()
    confirm(tab, "form[data-ask^='Let calls'] button")
    tab.run("(() => { const field = document.querySelector('[name=replicas]'); field.focus(); field.value = 2; })()")
    confirm(tab, "form[data-ask*='number of replicas'] button")
    tab.wait("document.querySelector('[data-live]').innerText.includes('2 / 2')")

    tab.run("document.querySelector('[name=args]').value = JSON.stringify(['by hand'])")
    confirm(tab, ".callform button")
    tab.wait("document.body.innerText.includes('<b>by hand</b>')")

    failed = shop.remote("bad luck")
    with pytest.raises(ValueError, match="bad"):
        failed.result(patience(LIMIT_S))
    tab.press("g", "c")
    tab.wait("location.pathname.endsWith('/calls')")
    tab.wait(f"document.querySelector('.dot.on') && document.querySelector('input[value={failed.id}]')")
    tab.press("j", "x")
    assert tab.run("document.querySelectorAll('input[name=id]:checked').length") == 1
    confirm(tab, "button[value=retry]")
    tab.press("/")
    assert tab.run("document.activeElement.name") == "error"
    tab.press("Escape", "?")
    tab.wait("document.querySelector('#keys[open]')")
    tab.press("Enter")
    tab.wait("!document.querySelector('#keys[open]')")
    tab.press("j", "Enter")
    tab.wait("location.pathname.includes('/calls/d')")


def test_a_page_shows_what_changes_while_one_looks(shop: Any, console: str, tab: Browser) -> None:
    log_in(tab, console, OPERATOR)
    tab.open(console + "/calls?deployment=shop")
    tab.wait("document.querySelector('.dot.on')")
    ref = shop.remote("appears by itself")
    ref.result(patience(LIMIT_S))
    tab.wait(f"document.querySelector('a[href$={ref.id}]')")
    assert len([url for url in tab.requested if url.endswith("/calls?deployment=shop")]) == 1


def test_a_page_without_a_stream_follows_all_the_same(shop: Any, console: str, tab: Browser) -> None:
    """As where four other tabs have one, or the gateway refuses it."""
    log_in(tab, console, OPERATOR)
    tab.run(
        "window.stop(), new BroadcastChannel('qserve-console').onmessage = (event) => {"
        "if (event.data === 'who?') for (let n = 0; n < 4; n++) event.target.postMessage('I'); }"
    )
    tab.run("disconnect(), connect()")
    tab.wait("document.querySelector('.dot').title.startsWith('Live, every')")
    assert any("once=1" in url for url in tab.requested)
    assert tab.run("stream") is None


def test_a_viewer_finds_nothing_to_press(shop: Any, console: str, tab: Browser) -> None:
    log_in(tab, console, VIEWER)
    for path in ("", "/deployments/shop", "/calls", "/dead", "/schedules"):
        tab.open(console + path)
        tab.wait("document.querySelector('.role')")
        assert tab.run("document.querySelectorAll('form[action$=\"/act\"] button').length") == 0
    assert (
        tab.run(
            "fetch('/-/console/act', {method: 'POST', body: new URLSearchParams({action: 'delete', about: 'shop', "
            "confirmed: 'yes'})}).then((answer) => answer.status)"
        )
        == 403
    )
    assert "shop" in serve.list_deployments()
    tab.click("form[action$='/logout'] button")
    tab.wait("document.querySelector('input[name=token]')")


def test_a_page_of_another_site_cannot_act_for_an_operator(shop: Any, console: str, tab: Browser) -> None:
    log_in(tab, console, OPERATOR)
    # Another site: the same server under another name, which is a page that a cookie is not sent from.
    other = console.replace("127.0.0.1", "localhost").removesuffix("/-/console") + "/-/healthz"
    tab.open(other)
    tab.run(
        f"(() => {{ const form = document.createElement('form'); form.method = 'post'; form.action = '{console}/act';"
        "for (const [name, value] of [['action', 'delete'], ['about', 'shop'], ['confirmed', 'yes']]) {"
        "const field = document.createElement('input'); field.name = name; field.value = value; form.append(field); }"
        "document.body.append(form); form.submit(); })()"
    )
    tab.wait("document.body.innerText.includes('other sites')")
    assert "shop" in serve.list_deployments()


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_its_window(shop: Any, console: str, tab: Browser, width: int) -> None:
    log_in(tab, console, OPERATOR)
    tab.look(width=width, dark=width == 360)
    for path in ("", "/deployments/shop", "/calls", "/troubles", "/dead", "/schedules", "/cluster", "/audit"):
        tab.open(console + path)
        assert tab.run("document.documentElement.scrollWidth") <= width, path
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(14, 17, 23)" if width == 360 else "rgb(246, 247, 249)")
    tab.look()


@pytest.mark.skipif(not PICTURES, reason="pictures are made by `make browser`")
def test_pictures_of_the_documentation(running: TestInstance, console: str, tab: Browser) -> None:
    from tests.instance.console.pictures import fill

    with fill(running.settings) as (failed, names):
        log_in(tab, console, OPERATOR)
        tab.look(width=1120, height=640)
        wait_until(lambda: len(serve.list_deployments()) == len(names))
        tab.open(console)
        # Counts of ten seconds each appear by themselves.
        times = "[...document.querySelectorAll('td[data-label=p50]')].map((each) => each.innerText)"
        tab.wait(f"{times}.filter((each) => each.includes('ms')).length >= 3")
        picture(tab, "overview")
        tab.open(f"{console}/deployments/Summarize?range=10m")
        tab.wait("document.querySelector('.uplot canvas')")
        picture(tab, "deployment")
        tab.open(f"{console}/calls")
        picture(tab, "calls")
        tab.open(f"{console}/calls/{failed}")
        picture(tab, "call")
        tab.look(width=360, height=640, dark=True)
        tab.open(console)
        picture(tab, "narrow")
        tab.look()
