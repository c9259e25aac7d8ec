"""How user code becomes a target, and is found again from it."""

import dataclasses
import inspect
import logging
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import flask
import pytest
from fastapi import FastAPI, datastructures
from pydantic import BaseModel, computed_field
from starlette.datastructures import State

from qserve.applications.app_import import import_app
from qserve.deployments.deployment import Deployment, deployment
from qserve.deployments.loading import importing, is_importing, load_target, make_target
from qserve.deployments.pickled_code import dumps, loads
from qserve.errors import ConfigurationError
from qserve.wire.spec import Target


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder on the path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(textwrap.dedent(text))


class Decorated:
    """Its name leads to the deployment, not to the class."""


class_itself = Decorated
globals()["Decorated"] = deployment(Decorated)


def plain() -> str:
    return "plain"


renamed: Deployment[Any] = deployment(name="renamed")(type("Anonymous", (), {"__module__": __name__}))


# Import paths


def test_code_behind_a_deployment_is_found_by_its_import_path() -> None:
    target = make_target(class_itself, allow_pickle=False)
    assert target.import_path == f"{__name__}:Decorated"
    assert load_target(target) is class_itself
    assert load_target(make_target(plain, allow_pickle=False)) is plain


def test_code_kept_only_under_another_name_is_found_too() -> None:
    target = make_target(renamed.func_or_class, allow_pickle=False)
    assert target.import_path == f"{__name__}:renamed"
    assert load_target(target) is renamed.func_or_class


def test_a_name_that_leads_elsewhere_is_not_used() -> None:
    class Decorated:
        pass

    Decorated.__qualname__ = "Decorated"
    assert make_target(Decorated, allow_pickle=True).pickled


def test_the_folder_of_the_users_module_travels_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "users_module.py", "def f(): return 1")
    users_module = __import__("users_module")
    target = make_target(users_module.f, allow_pickle=False)
    assert target.sys_path == (str(folder),)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    del sys.modules["users_module"]
    assert callable(load_target(target))
    assert sys.path[0] == str(folder)


def test_installed_modules_need_no_folder() -> None:
    assert make_target(State, allow_pickle=False).sys_path == ()


def test_deploying_does_nothing_while_code_is_loaded(folder: Path) -> None:
    write(
        folder,
        "seed_script.py",
        """
        from qserve.deployments.deployment import deployment
        from qserve.deployments.loading import is_importing

        seen = is_importing()

        @deployment
        def hello(): ...

        hello.deploy()
        """,
    )
    load_target(Target(import_path="seed_script:hello"))
    assert sys.modules["seed_script"].seen is True
    assert is_importing() is False


def test_importing_is_seen_in_its_own_thread_only() -> None:
    seen = []
    with importing():
        thread = threading.Thread(target=lambda: seen.append(is_importing()))
        thread.start()
        thread.join()
        assert is_importing()
    assert seen == [False]


# Errors


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no module named 'no_such_module'"):
        load_target(Target(import_path="no_such_module:x"))


def test_an_unknown_attribute_is_named() -> None:
    with pytest.raises(ConfigurationError, match=f"Attribute 'Missing.x' not found in module '{__name__}'"):
        load_target(Target(import_path=f"{__name__}:Missing.x"))


def test_a_module_that_raises_shows_the_users_lines_only(folder: Path) -> None:
    write(folder, "broken.py", "import helper_of_broken")
    write(folder, "helper_of_broken.py", "def f():\n    return 1 / 0\n\nf()\n")
    with pytest.raises(ConfigurationError) as caught:
        load_target(Target(import_path="broken:x"))
    text = str(caught.value)
    assert "Could not import module 'broken'" in text
    assert "helper_of_broken.py" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "importlib" not in text
    assert "loading.py" not in text


def test_a_missing_dependency_of_the_module_is_not_taken_for_the_module(folder: Path) -> None:
    write(folder, "needs_more.py", "import not_installed_here")
    with pytest.raises(ConfigurationError, match=r"(?s)'needs_more':.*not_installed_here"):
        load_target(Target(import_path="needs_more:x"))


def test_a_pickle_that_does_not_load_is_an_error_of_ours() -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded here"):
        load_target(Target(pickled=b"nonsense"))


def test_code_that_cannot_be_pickled_is_named() -> None:
    generator = (number for number in range(3))

    def uses_generator() -> int:
        return next(generator)

    with pytest.raises(ConfigurationError, match=r"uses_generator.*cannot be pickled.*generator"):
        make_target(uses_generator, allow_pickle=True)


def test_locals_need_a_key() -> None:
    def local() -> None: ...

    with pytest.raises(ConfigurationError, match=r"a function.*QSERVE_SECRET"):
        make_target(local, allow_pickle=False)
    assert load_target(make_target(local, allow_pickle=True)) is not local


# Pickles


def test_state_and_locks_are_pickled_afresh() -> None:
    state = State({"word": "kept"})
    state.myself = state
    lock, again = threading.Lock(), threading.RLock()
    with lock, again:
        restored, lock2, again2 = cloudpickle.loads(dumps((state, lock, again)))
    assert restored.word == "kept"
    assert restored.myself is restored
    assert lock2.acquire(blocking=False)
    assert type(again2) is type(again)


def test_what_installed_packages_tell_apart_by_identity_stays_what_it_is() -> None:
    fields, parameters = dataclasses.MISSING, (datastructures._Unset, logging.root, inspect.Parameter.empty)
    local = FastAPI()
    restored = loads(dumps((fields, parameters, local)))
    assert restored[0] is dataclasses.MISSING
    assert all(one is other for one, other in zip(restored[1], parameters, strict=True))
    assert isinstance(restored[2], FastAPI)
    assert restored[2] is not local


def test_proxies_that_a_package_keeps_are_found_there() -> None:
    """They answer for what they stand for, which is not there while they are being unpickled."""
    assert loads(dumps([flask.request, flask.g]))[0] is flask.request


def test_weak_references_and_dictionaries_are_pickled() -> None:
    one, other = State(), State()
    keys, values = weakref.WeakKeyDictionary({one: 1}), weakref.WeakValueDictionary({"other": other})
    again, reference, keys, values = loads(dumps(([one, other], weakref.ref(one), keys, values)))
    assert reference() is again[0]
    assert keys[again[0]] == 1
    assert values["other"] is again[1]


def test_models_of_a_local_scope_leave_its_other_locals_behind() -> None:
    nothing_to_pickle = (number for number in range(3))

    class Inner(BaseModel):
        n: int

    class Outer(BaseModel):
        inner: Inner

        @computed_field  # type: ignore[prop-decorator]
        @property
        def twice(self) -> "Inner":
            return Inner(n=2 * self.inner.n)

    restored: Any = load_target(make_target(Outer, allow_pickle=True))
    assert restored is Outer or restored(inner={"n": 1}).model_dump() == {"inner": {"n": 1}, "twice": {"n": 2}}
    assert next(nothing_to_pickle) == 0


def test_a_class_that_is_mapped_to_a_table_is_not_taken_apart() -> None:
    class Hero:
        _sa_class_manager = "as SQLAlchemy and SQLModel set it"

    def uses_hero() -> Hero:
        return Hero()

    with pytest.raises(ConfigurationError, match=r"uses_hero'.*Hero' is a class that SQLAlchemy or SQLModel maps"):
        make_target(uses_hero, allow_pickle=True)


def test_tracebacks_of_pickled_code_name_its_file() -> None:
    def local() -> None:
        raise KeyError

    restored: Any = loads(dumps(local))
    assert restored.__code__.co_filename == __file__


# Applications


def test_all_deployments_of_a_module_or_one_or_a_list(folder: Path) -> None:
    write(
        folder,
        "application.py",
        """
        from qserve.deployments.deployment import deployment

        @deployment
        def first(): ...

        @deployment
        class Second: ...

        same = first
        some = [first]
        number = 3
        """,
    )
    assert [each.name for each in import_app("application")] == ["first", "Second"]
    assert [each.name for each in import_app("application:Second")] == ["Second"]
    assert [each.name for each in import_app("application:some")] == ["first"]
    assert all(isinstance(each, Deployment) for each in import_app("application"))
    with pytest.raises(ConfigurationError, match=r"nothing to deploy in 'application:number': it is an .* int"):
        import_app("application:number")
    with pytest.raises(ConfigurationError, match="Attribute 'third' not found"):
        import_app("application:third")


@pytest.mark.parametrize("text", ["", ":x", "module:"])
def test_a_malformed_import_string_shows_the_format(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r'must be in format "<module>" or "<module>:<name>"'):
        import_app(text)


def test_a_file_stands_for_its_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shop" / "web").mkdir(parents=True)
    write(folder, "shop/__init__.py", "")
    write(folder, "shop/web/__init__.py", "name = 'front'")
    write(
        folder,
        "shop/web/main.py",
        """
        from qserve.deployments.deployment import deployment
        from . import name

        @deployment(name=name)
        def page(): ...
        """,
    )
    monkeypatch.chdir(folder / "shop")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    (page,) = import_app("./web/main.py")
    assert page.name == "front"
    assert import_app("web/main.py:page") == [page]
    assert make_target(page.func_or_class, allow_pickle=False).import_path == "shop.web.main:page"


def test_a_file_that_is_not_there_or_hides_behind_another_module_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    write(folder, "json.py", "")
    with pytest.raises(ConfigurationError, match=r"There is no Python file 'examples/helo\.py'"):
        import_app("./examples/helo.py")
    with pytest.raises(ConfigurationError, match=r"would be the module 'json', and another .*Rename the file"):
        import_app("json.py")


def test_two_deployments_of_one_name_are_refused(folder: Path) -> None:
    write(
        folder,
        "doubled.py",
        """
        from qserve.deployments.deployment import deployment

        @deployment(name="same")
        def first(): ...

        @deployment(name="same")
        def second(): ...
        """,
    )
    with pytest.raises(ConfigurationError, match="named 'same'"):
        import_app("doubled")
