"""`qserve run app.yaml`, and what `qserve deploy` changes when the file changes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving import runtime_folder
from tests.support.shell import Running, Shell, background, get

APP = """
    import os
    from qserve import serve

    @serve.deployment
    class Model:
        def __init__(self, name="none"):
            self.name = name

        def reconfigure(self, config):
            self.factor = config["factor"]

        def __call__(self, request):
            return {"name": self.name, "factor": self.factor, "pid": os.getpid(), "region": os.environ.get("REGION")}

    def app(args):
        return Model.bind(**args)
    """
BESIDE = """
    from qserve import serve

    @serve.deployment
    def beside():
        return "beside"
    """
BOTH = """
    applications:
      - name: one
        route_prefix: /one
        import_path: app:app
        args: {name: first}
        runtime_env: {env_vars: {REGION: north}}
        deployments: [{name: Model, user_config: {factor: 1}}]
      - name: two
        route_prefix: /two
        import_path: app:app
        deployments: [{name: Model, user_config: {factor: 1}}]
    """


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Running]]:
    """`qserve run app.yaml`, and a shell beside it."""
    with runtime_folder() as runtime:
        shell = Shell(tmp_path_factory.mktemp("project"), runtime)
        shell.write("app.py", APP)
        shell.write("app.yaml", BOTH)
        with background(shell, "run", "app.yaml", "--port", "0") as running:
            running.wait_for("Ctrl-C stops it")
            yield shell, running


def ask(url: str, application: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(get(f"{url}/{application}"))
    return answer


def test_a_file_is_deployed_again_and_only_what_changed_in_it_changes(served: tuple[Shell, Running]) -> None:
    shell, running = served
    url = running.wait_for(r"curl (http://.*)/one")[1]
    one, two = ask(url, "one"), ask(url, "two")
    assert (one["name"], one["factor"], one["region"]) == ("first", 1, "north")
    assert (two["name"], two["region"]) == ("none", None)

    shell.write("beside.py", BESIDE)
    assert shell.run("deploy", "beside:beside").returncode == 0
    changed = BOTH.replace("args: {name: first}", "args: {name: other}")
    changed = changed.replace("factor: 1", "factor: 2")
    shell.write("app.yaml", changed)
    assert shell.run("deploy", "app.yaml").returncode == 0
    assert ask(url, "two") == {**two, "factor": 2}  # in the same replica
    replaced = ask(url, "one")
    assert (replaced["name"], replaced["pid"] != one["pid"]) == ("other", True)

    # an application goes, and one that is new has its route
    shell.write("app.yaml", changed.replace("name: two", "name: three"))
    done = shell.run("deploy", "app.yaml")
    assert "The application two is no longer in the file: deleted" in done.stderr
    assert ask(url, "two")["pid"] != two["pid"]
    assert ask(url, "one") == replaced
    assert get(f"{url}/beside") == "beside"  # it is in no file

    # two applications change their routes with each other
    three = ask(url, "two")
    swapped = changed.replace("name: two", "name: three").replace("route_prefix: /one", "route_prefix: /other")
    shell.write("app.yaml", swapped.replace("prefix: /two", "prefix: /one").replace("prefix: /other", "prefix: /two"))
    assert shell.run("deploy", "app.yaml").returncode == 0
    assert (ask(url, "one"), ask(url, "two")) == (three, replaced)
