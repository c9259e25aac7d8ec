"""Applications: what `bind` makes, and the deployments that a graph of them is."""

from typing import Any, NamedTuple

import pytest

from qserve import serve
from qserve.applications.app_import import import_app
from qserve.applications.graph import make_graph
from qserve.calls.handle import DeploymentHandle
from qserve.deployments.deployment import Deployment
from tests.support.local_code import CODEC


@serve.deployment
class Model:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args


@serve.deployment
class Driver:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args


class Pair(NamedTuple):
    one: Any
    other: Any


def test_applications_among_the_arguments_become_handles() -> None:
    inner = Model.bind(1)
    app = Driver.bind(inner, [inner, {"k": (Model.bind(2),)}], Pair(inner, 3), model=Model.bind())
    graph = make_graph(app)
    assert [each.name for each in graph.deployments] == ["Model", "Model_1", "Model_2", "Driver"]
    first, listed, pair = graph.root.init_args
    assert isinstance(first, DeploymentHandle)
    assert (first.deployment_name, listed[0]) == ("Model", first)
    assert listed[1]["k"][0].deployment_name == "Model_1"
    assert pair == Pair(first, 3)
    assert graph.root.init_kwargs["model"].deployment_name == "Model_2"
    assert [each.init_args for each in graph.deployments[:3]] == [(1,), (2,), ()]


def test_only_the_root_is_served_over_http() -> None:
    graph = make_graph(Driver.bind(Model.options(route_prefix="/m").bind()))
    assert [each.route_prefix for each in graph.deployments] == [None, "/"]
    assert make_graph(Model.options(route_prefix="/m").bind()).root.route_prefix == "/m"
    assert make_graph(Model.options(route_prefix="/m").bind(), route_prefix="/x").root.route_prefix == "/x"
    assert make_graph(Model.bind(), route_prefix=None).root.route_prefix is None


def test_deployments_of_named_applications_have_its_name_before_theirs() -> None:
    graph = make_graph(Driver.bind(Model.bind(), Model.bind()), "shop")
    assert [each.name for each in graph.deployments] == ["shop.Model", "shop.Model_1", "shop.Driver"]
    specs = [each.to_spec(CODEC) for each in graph.deployments]
    assert [(each.application, each.is_root) for each in specs] == [("shop", False), ("shop", False), ("shop", True)]
    again = Deployment.from_spec(make_graph(Model.bind(), "shop").root.to_spec(CODEC), CODEC).options(num_replicas=2)
    assert (again.to_spec(CODEC).application, again.to_spec(CODEC).is_root) == ("shop", True)


@pytest.mark.parametrize(
    ("name", "text"), [("my app", "'my app' is not possible"), ("x" * 60, "is too long"), (3, "name 3 is not possible")]
)
def test_names_that_are_not_possible(name: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_graph(Driver.bind(), name)


def test_an_application_cannot_be_called_before_it_is_deployed() -> None:
    with pytest.raises(RuntimeError, match=r"handle = serve\.run\(app\)"):
        Model.bind()()
    app: Any = Model.bind()
    with pytest.raises(AttributeError, match="deploy it with"):
        app.predict.remote(1)


def test_a_module_is_its_application(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    head = "from qserve import serve\n@serve.deployment\nclass A:\n    pass\n@serve.deployment\nclass B:\n    pass\n"
    (tmp_path / "one_app.py").write_text(head + "a = A.bind()\nroot = B.bind(a)\n")
    (tmp_path / "two_apps.py").write_text(head + "first = A.bind()\nsecond = B.bind()\n")
    (tmp_path / "named_app.py").write_text(head + "first = A.bind()\napp = B.bind()\n")
    assert [each.name for each in import_app("one_app")] == ["A", "B"]
    assert [each.name for each in import_app("one_app:a")] == ["A"]
    assert [each.name for each in import_app("named_app")] == ["B"]
    with pytest.raises(Exception, match=r"several applications in 'two_apps': name one, as in 'two_apps:first'"):
        import_app("two_apps")
