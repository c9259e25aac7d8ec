"""The documentation site: every page is in its navigation, and every error in its reference."""

import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from qserve import errors, serve
from tests.support.serving import ROOT


def load_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs/build_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site: Any = load_site()
REPOSITORY = "https://github.com/qserve/qserve"


def test_the_navigation_names_every_page_and_no_other() -> None:
    named = set(site.nav_pages(site.configuration()["nav"]))

    there = {str(site.place_of(page)) for page in site.pages() if page.suffix == ".md"}

    decisions = {page for page in there if page.startswith("decisions/")} - {"decisions/README.md"}
    assert named == there - decisions  # decisions/README.md is their index


def test_links_stay_in_the_site_or_lead_to_the_repository() -> None:
    text = "[a](docs/quickstart.md#2-run-it) [b](LICENSE) [c](examples) [d](https://x.y/z.md)\n```\n[e](none.md)\n```\n"

    found = site.in_the_site(Path("README.md"), text)

    url = site.configuration()["repo_url"]
    assert found == (
        f"[a](quickstart.md#2-run-it) [b]({url}/blob/main/LICENSE) [c]({url}/tree/main/examples) [d](https://x.y/z.md)\n"
        "```\n[e](none.md)\n```\n"
    )


def test_a_link_to_a_file_that_is_missing_ends_the_build() -> None:
    with pytest.raises(SystemExit, match=r"docs/quickstart\.md links to \.\./none\.md, which does not exist"):
        site.in_the_site(Path("docs/quickstart.md"), "[a](../none.md)")


def test_the_error_reference_has_every_error_with_its_status() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    raised = {
        name: cls
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.QServeError) and cls is not errors.QServeError
    }

    assert sections.keys() == raised.keys()
    for name, cls in raised.items():
        told = re.match(r"HTTP (\d+)", sections[name])
        if told is not None:
            assert int(told[1]) == cls.status, name
        assert "- What to do:" in sections[name], name


def test_the_reference_has_every_function_of_serve_and_names_nothing_that_is_not_there() -> None:
    page = (ROOT / "docs/reference/serve.md").read_text() + (ROOT / "docs/reference/handles.md").read_text()
    shown = set()
    for name, members in re.findall(
        r"^::: (\S+)(?:\n    options:\n(?:      .*\n)*?      members: \[(.*)\])?", page, re.M
    ):
        found = pkgutil.resolve_name(name)
        shown.add(name.rpartition(".")[2])
        for member in filter(None, members.split(", ")):
            assert hasattr(found, member), f"{name} has no {member}"
            shown.add(member)

    functions = {name for name in serve.__all__ if inspect.isfunction(getattr(serve, name))}
    assert functions <= shown
    assert {"Deployment", "DeploymentHandle", "DurableRef", "HTTPOptions", "ReplicaContext", "RunTarget"} <= shown


def test_pages_for_language_models_name_each_page(tmp_path: Path) -> None:
    for page in site.nav_pages(site.configuration()["nav"]):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(f"<!-- run -->\n# Page {page}\n")

    site.write_llms(tmp_path)

    index = (tmp_path / "llms.txt").read_text()
    assert index.startswith("# qserve\n\n> ")
    assert "- [Page quickstart.md](https://qserve.github.io/qserve/quickstart)" in index
    assert "<!--" not in (tmp_path / "llms-full.txt").read_text()


def test_a_page_that_fetches_from_another_host_ends_the_build(tmp_path: Path) -> None:
    page = tmp_path / "a/b.html"
    page.parent.mkdir()
    page.write_text('<a href="https://x.y/"></a><script src="../own.js"></script>')
    site.check_that_it_needs_no_network(tmp_path)

    page.write_text('<script async src="https://x.y/z.js"></script>')

    with pytest.raises(SystemExit, match=r"a/b\.html fetches https://x\.y/z\.js"):
        site.check_that_it_needs_no_network(tmp_path)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    rules = yaml.safe_load((ROOT / "deploy/observability/rules.yml").read_text())
    alerts = {rule["alert"]: rule["annotations"] for group in rules["groups"] for rule in group["rules"]}
    page = (ROOT / "docs/alerts.md").read_text()
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert parts.keys() == alerts.keys()
    for name, annotations in alerts.items():
        assert annotations["runbook_url"] == f"{REPOSITORY}/blob/main/docs/alerts.md#{name.lower()}"
        assert {"**Look**", "**do**"} <= set(re.findall(r"\*\*\w+\*\*", parts[name].replace("**Do**", "**do**")))
