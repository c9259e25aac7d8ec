"""Scripts that deploy what they define, as a user runs them."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.serving import environment, runtime_folder
from tests.support.slowness import patience

SCRIPT = """
    from __future__ import annotations

    import functools
    import sqlite3
    import sys

    from pydantic import BaseModel
    from qserve import serve

    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("create table words as select 'kept' as word")


    class Word(BaseModel):
        text: str


    @functools.lru_cache
    def greeting() -> Word:
        return Word(text="hello")


    @serve.deployment
    def pickled(word: Word) -> list:
        main = sys.modules["__main__"]
        return [greeting().text, main.greeting is greeting, isinstance(word, main.Word), main.__file__ == __file__]


    @serve.deployment
    def run_again(word: Word) -> list:
        kept = database.execute("select word from words").fetchone()[0]
        return [kept, __name__, type(word) is Word, Word(text=word.text)]


    if __name__ == "__main__":
        serve.start(http_options={"location": "NoServer"})
        pickled.deploy()
        run_again.deploy()
        print(pickled.get_handle().remote(Word(text="x")).result())
        *rest, word = run_again.get_handle().remote(Word(text="y")).result()
        print(rest, word == Word(text="y"))
        serve.shutdown()
"""


@pytest.mark.parametrize("is_module", [False, True])
def test_a_script_finds_its_own_names_in_replicas_whether_pickled_or_run_again(is_module: bool, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with runtime_folder() as runtime:
        done = subprocess.run(
            [sys.executable, *(["-m", "program"] if is_module else [str(script)])],
            cwd=tmp_path,
            env=environment(runtime),
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )
    name = "program" if is_module else "__main__"
    assert done.stdout.splitlines() == [
        "['hello', True, True, True]",
        f"['kept', '{name}', True] True",
    ], done.stderr
