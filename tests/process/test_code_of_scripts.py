"""What a script deploys is in a replica what it is in the script: applications, models, dependencies, imports."""

import json
import textwrap
from pathlib import Path

import pytest

from tests.support.script_code import answers, call, error_of, target_of

SERVED = """
@serve.deployment(route_prefix="/")
@serve.ingress(app)
class Api:
    pass


if __name__ == "__main__":
    open("openapi.json", "w").write(json.dumps(app.openapi()))
    hand_over(Api)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_the_openapi_document_is_the_one_of_the_script(script: Path) -> None:
    source = """
        from __future__ import annotations

        import json
        from typing import Annotated

        from fastapi import APIRouter, Body, Cookie, Depends, FastAPI, Header, Path, Query
        from pydantic import BaseModel, Field

        class Part(BaseModel):
            size: int = Field(gt=0, examples=[3])

        class Item(BaseModel):
            name: str
            parts: list[Part] = []

        class Paging:
            def __init__(self, limit: int = Query(10, le=100), after: str | None = None) -> None:
                self.limit = limit

        app = FastAPI(title="Stock")
        router = APIRouter(prefix="/items", tags=["items"])

        @app.get("/plain")
        def plain(x: int, y: Annotated[str, Query(alias="why")] = "", z: str = Cookie(""), h: str = Header("")) -> int:
            return x

        @router.get("/{name}")
        def one(name: Annotated[str, Path(min_length=2)], paging: Annotated[Paging, Depends()]) -> Item:
            return Item(name=name, parts=[Part(size=paging.limit)])

        @router.post("", responses={409: {"model": Part}})
        def add(item: Item, note: Annotated[str, Body()] = "") -> Item:
            return item

        app.include_router(router)
    """
    target = target_of(script, textwrap.dedent(source) + SERVED)
    in_script = json.loads((script.parent / "openapi.json").read_text())
    item = {"name": "nut", "parts": [{"size": 10}]}
    found = answers(
        target,
        ["GET", "/openapi.json", None],
        ["GET", "/plain?x=4", None],
        ["GET", "/items/nut", None],
        ["POST", "/items", {"item": item}],
        ["GET", "/items/n", None],
        ["GET", "/docs", None],
    )
    assert found[0] == [200, in_script]
    assert found[1:4] == [[200, 4], [200, item], [200, item]]
    assert [status for status, _ in found[4:]] == [422, 200]


def test_annotations_that_are_strings_find_what_they_name(script: Path) -> None:
    target = target_of(
        script,
        """
        from __future__ import annotations

        import dataclasses
        import typing

        from fastapi import APIRouter, FastAPI, Request
        from pydantic import BaseModel

        class Item(BaseModel):
            n: int

        @dataclasses.dataclass
        class Pair:
            first: Item
            second: "Item | None" = None

        app = FastAPI()
        router = APIRouter()

        @router.get("/included")
        def included(request: Request) -> str:
            return request.url.path

        app.include_router(router)

        @serve.deployment
        @serve.ingress(app)
        class Api:
            @app.post("/method")
            def method(self, item: Item, request: Request) -> Item:
                return item

            @app.get("/hints")
            def hints(self) -> list[str]:
                return [str(hint) for hint in typing.get_type_hints(Pair).values()]

        if __name__ == "__main__":
            hand_over(Api)
        """,
    )
    found = answers(target, ["GET", "/included", None], ["POST", "/method", {"n": 2}], ["GET", "/hints", None])
    assert found == [
        [200, "/included"],
        [200, {"n": 2}],
        [200, ["<class '__main__.Item'>", "__main__.Item | None"]],
    ]


def test_dependencies_of_every_kind_arrive(script: Path) -> None:
    target = target_of(
        script,
        """
        import contextvars
        import functools
        import threading
        from typing import Annotated

        from fastapi import Depends, FastAPI

        class Refusal(Exception):
            def __init__(self, code: int, text: str) -> None:
                super().__init__(text)
                self.code = code

        app = FastAPI()
        refusal = Refusal(3, "no")
        tenant = contextvars.ContextVar("tenant", default="nobody")
        unset = contextvars.ContextVar("unset")
        local = threading.local()

        @functools.lru_cache(maxsize=3)
        def settings(name: str = "orchard") -> dict:
            return {"name": name}

        @functools.singledispatch
        def show(value):
            return "object"

        @show.register
        def _(value: int):
            return "int"

        show("seen before it travels")

        class AtLeast:
            def __init__(self, least: int) -> None:
                self.least = least

            def __call__(self, n: int) -> int:
                return max(n, self.least)

        def session():
            local.word = "open"
            yield local.word

        @app.get("/")
        def all_of_them(
            conf: Annotated[dict, Depends(settings)],
            n: Annotated[int, Depends(AtLeast(5))],
            opened: Annotated[str, Depends(session)],
        ) -> list:
            return [conf["name"], n, opened, show(1), show(""), tenant.get(), unset.get("unset"),
                    settings.cache_parameters()["maxsize"], refusal.code, str(refusal)]

        @serve.deployment
        @serve.ingress(app)
        class Api:
            pass

        hand_over(Api)
        """,
    )
    assert answers(target, ["GET", "/?n=1", None]) == [
        [200, ["orchard", 5, "open", "int", "object", "nobody", "unset", 3, 3, "no"]]
    ]


def test_types_and_tools_at_the_top_of_a_script_arrive(script: Path) -> None:
    target = target_of(
        script,
        """
        import asyncio
        import concurrent.futures
        import dataclasses
        import enum
        import functools
        import queue
        import typing

        from pydantic import BaseModel, Field, RootModel, TypeAdapter, computed_field, field_validator
        from typing_extensions import TypedDict

        UserId = typing.NewType("UserId", int)
        T = typing.TypeVar("T")
        P = typing.ParamSpec("P")
        Ts = typing.TypeVarTuple("Ts")

        class Options(TypedDict, total=False):
            user: UserId

        class Point(typing.NamedTuple):
            x: int
            y: int = 2

        class Flags(enum.Flag):
            A = enum.auto()
            B = enum.auto()

        @dataclasses.dataclass(slots=True, frozen=True)
        class Slot:
            n: int = 1

        class Cat(BaseModel):
            kind: typing.Literal["cat"] = "cat"
            lives: int = 9

            @field_validator("lives")
            @classmethod
            def check(cls, lives: int) -> int:
                if lives > 9:
                    raise ValueError("too many")
                return lives

            @computed_field
            @property
            def twice(self) -> int:
                return 2 * self.lives

        class Kitten(Cat):
            kind: typing.Literal["kitten"] = "kitten"

            def dump(self) -> dict:
                return super().model_dump()

        class Page(BaseModel, typing.Generic[T]):
            items: list[T]

        class Names(RootModel[list[str]]):
            pass

        Pet = typing.Annotated[Cat | Kitten, Field(discriminator="kind")]
        pets = TypeAdapter(list[Pet])
        pool = concurrent.futures.ThreadPoolExecutor(2, "mine")
        waiting = queue.Queue()
        waiting.put("waited")
        gate = asyncio.Semaphore(1)

        def logged(function: typing.Callable[P, T]) -> typing.Callable[P, T]:
            @functools.wraps(function)
            def inner(*args: P.args, **kwargs: P.kwargs) -> T:
                return function(*args, **kwargs)
            return inner

        @serve.deployment
        @logged
        def check(n: UserId) -> list:
            assert (UserId(n), Options(user=n)["user"], Point(1).y, Slot(2).n) == (n, n, 2, 2)
            assert Flags.A | Flags.B == Flags(3)
            assert str(Ts) and gate.locked() is False
            found = pets.validate_python([{"kind": "cat"}, {"kind": "kitten", "lives": n}])
            page = Page[Cat].model_validate({"items": [{"lives": 1}]})
            return [found[1].dump(), page.items[0].twice, Names(["a"]).root, pool.submit(waiting.get).result(),
                    type(found[0]) is Cat]

        hand_over(check)
        """,
    )
    assert call(target, 3) == [{"kind": "kitten", "lives": 3, "twice": 6}, 2, ["a"], "waited", True]


def test_structs_of_msgspec_arrive_with_their_fields(script: Path) -> None:
    target = target_of(
        script,
        """
        import inspect
        from typing import ClassVar, Optional

        import msgspec

        class Node(msgspec.Struct, frozen=True, tag="node", rename="camel"):
            first_child: Optional["Node"] = None
            words: list[str] = msgspec.field(default_factory=lambda: ["new"])
            limit: ClassVar[int] = 3

            def alone(self) -> "Node":
                return Node(words=self.words)

        class Leaf(Node, kw_only=True):
            size: int
            words: list[str] = []

        class Pair(msgspec.Struct):
            left: Leaf
            right: int = 0

        as_it_was = [str(inspect.signature(Leaf)), str(inspect.signature(Pair))]

        @serve.deployment
        def check() -> list:
            read = msgspec.json.decode(b'{"type":"node","firstChild":{"type":"node"}}', type=Node)
            assert read == Node(Node()) and read.first_child.words == ["new"] and hash(Pair) and Node.limit == 3
            pair = Pair(Leaf(size=2))
            assert [str(inspect.signature(Leaf)), str(inspect.signature(Pair))] == as_it_was
            return [msgspec.json.encode(pair).decode(), type(read.alone()) is Node, isinstance(pair.left, Node)]

        hand_over(check)
        """,
    )
    assert call(target) == [
        '{"left":{"type":"node","firstChild":null,"words":[],"size":2},"right":0}',
        True,
        True,
    ]


def test_models_may_refer_to_themselves_and_to_each_other(script: Path) -> None:
    target = target_of(
        script,
        """
        from fastapi import FastAPI
        from pydantic import BaseModel
        from pydantic.dataclasses import dataclass

        class Tree(BaseModel):
            children: "list[Tree]" = []
            owner: "Owner | None" = None

        class Owner(BaseModel):
            trees: list[Tree] = []

        @dataclass
        class Link:
            after: "Link | None" = None

        app = FastAPI()

        @app.post("/tree")
        def tree(given: Tree) -> Tree:
            return given

        @app.post("/link")
        def link(given: Link) -> Link:
            return given

        @serve.deployment
        @serve.ingress(app)
        class Api:
            @app.get("/grown")
            def grown(self) -> Owner:
                return Owner(trees=[Tree(children=[Tree()])])

        hand_over(Api)
        """,
    )
    leaf: dict[str, object] = {"children": [], "owner": None}
    tree = {"children": [leaf], "owner": {"trees": [leaf]}}
    assert answers(
        target,
        ["POST", "/tree", tree],
        ["POST", "/tree", {"children": [1]}],
        ["POST", "/link", {"after": {"after": None}}],
        ["GET", "/grown", None],
    )[0::2] == [[200, tree], [200, {"after": {"after": None}}]]
    found = answers(target, ["POST", "/tree", {"children": [1]}], ["GET", "/grown", None])
    assert found[0][0] == 422
    assert found[1] == [200, {"trees": [{"children": [leaf], "owner": None}]}]


def test_templates_and_static_files_are_served(script: Path) -> None:
    (script.parent / "static").mkdir()
    (script.parent / "static" / "a.txt").write_text("static")
    (script.parent / "templates").mkdir()
    (script.parent / "templates" / "a.html").write_text("{{ id }} at {{ url_for('page', id=id).path }}")
    target = target_of(
        script,
        """
        from pathlib import Path

        from fastapi import FastAPI, Request
        from fastapi.staticfiles import StaticFiles
        from fastapi.templating import Jinja2Templates

        here = Path(__file__).parent
        app = FastAPI()
        app.mount("/static", StaticFiles(directory=here / "static"), name="static")
        templates = Jinja2Templates(directory=here / "templates")
        templates.get_template("a.html")

        @app.get("/pages/{id}")
        def page(request: Request, id: str):
            return templates.TemplateResponse(request, "a.html", {"id": id})

        @serve.deployment
        @serve.ingress(app)
        class Api:
            pass

        hand_over(Api)
        """,
    )
    assert answers(target, ["GET", "/pages/7", None], ["GET", "/static/a.txt", None]) == [
        [200, "7 at /pages/7"],
        [200, "static"],
    ]


def test_names_of_the_script_are_found_where_python_looks_for_them(script: Path) -> None:
    target = target_of(
        script,
        """
        import enum
        import pickle
        import sys

        class Colour(enum.Enum):
            RED = "red"

        def paint(colour: str) -> str:
            return colour

        @serve.deployment
        def check(colour: str) -> list:
            same = pickle.loads(pickle.dumps(Colour.RED)) is Colour.RED
            main = sys.modules["__main__"]
            return [same, main.paint is paint, __name__, __file__.endswith("script.py")]

        hand_over(check)
        """,
    )
    assert target.pickled
    assert call(target, "red") == [True, True, "__main__", True]


@pytest.mark.parametrize("main_block", [True, False])
def test_processes_that_a_replica_spawns_run_a_script_only_if_it_has_a_main_block(
    script: Path, main_block: bool
) -> None:
    target = target_of(
        script,
        f"""
        import concurrent.futures
        import multiprocessing
        import operator
        import pathlib

        with open(pathlib.Path(__file__).with_name("runs"), "a") as runs:
            runs.write("run ")

        def double(x: int) -> int:
            return 2 * x

        @serve.deployment
        def work(x: int) -> list:
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                return [pool.submit(double if {main_block} else operator.neg, x).result(), double(x)]

        {'if __name__ == "__main__":' if main_block else "if True:"}
            hand_over(work)
        """,
    )
    assert call(target, 4) == [8 if main_block else -4, 8]
    assert (script.parent / "runs").read_text() == ("run run " if main_block else "run ")


# Running the script again


UNPICKLED = """
    import json
    import sqlite3

    from fastapi import FastAPI

    app = FastAPI()
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("create table words as select 'kept' as word")

    @app.get("/")
    def read() -> str:
        return database.execute("select word from words").fetchone()[0]

    @serve.deployment
    @serve.ingress(app)
    class Api:
        pass
"""


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_a_script_with_a_main_block_is_run_again_where_it_cannot_be_pickled(script: Path, allow_pickle: bool) -> None:
    main_block = f"""
    if __name__ == "__main__":
        app = None
        hand_over(Api, allow_pickle={allow_pickle})
    """
    target = target_of(script, UNPICKLED + main_block)
    assert target.import_path == f"{script}:Api"
    assert answers(target, ["GET", "/", None]) == [[200, "kept"]]


def test_without_a_main_block_the_error_names_what_cannot_travel_and_the_way_out(script: Path) -> None:
    text = error_of(script, UNPICKLED + "\n    hand_over(Api)\n")
    assert "'Api' cannot be pickled" in text
    assert "'database', which 'read' uses: TypeError: cannot pickle 'sqlite3.Connection' object" in text
    assert "__name__ == '__main__'" in text


def test_what_is_defined_in_the_main_block_is_not_looked_for_in_the_script(script: Path) -> None:
    text = error_of(
        script,
        """
        import sqlite3

        if __name__ == "__main__":
            database = sqlite3.connect(":memory:")

            @serve.deployment
            def read() -> str:
                return database.execute("select 1").fetchone()

            hand_over(read)
        """,
    )
    assert "'read' cannot be pickled" in text


def test_a_script_that_is_not_there_is_named(script: Path) -> None:
    target = target_of(script, UNPICKLED + '\n    if __name__ == "__main__":\n        hand_over(Api)\n')
    script.unlink()
    with pytest.raises(AssertionError, match=r"script .*script\.py' cannot be read on this machine"):
        answers(target, ["GET", "/", None])


def test_a_module_that_runs_as_the_script_imports_from_its_package(tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text("class Net:\n    def predict(self, x):\n        return 2 * x\n")
    target = target_of(
        package / "main.py",
        """
        from .net import Net

        @serve.deployment
        class Model:
            def __init__(self):
                self.net = Net()

            def __call__(self, x):
                from . import net
                assert isinstance(self.net, net.Net)
                return self.net.predict(x)

        if __name__ == "__main__":
            hand_over(Model)
        """,
        module="shop.main",
    )
    assert call(target, 4) == 8
