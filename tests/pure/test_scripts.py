"""The Lua scripts: one name each, in the file, in its first words and in Python."""

import re
from pathlib import Path

import pytest

from qserve.broker import scripts
from qserve.broker.scripts import Script

FILES = {path.stem: path.read_text() for path in (Path(scripts.__file__).parent / "lua").glob("*.lua")}
SHARED = {name for name in FILES if name.startswith("shared_")}
SCRIPTS = {name.lower(): value for name, value in vars(scripts).items() if isinstance(value, Script)}


def test_every_file_has_the_constant_of_its_name() -> None:
    assert SCRIPTS.keys() == FILES.keys() - SHARED
    assert [name for name, script in SCRIPTS.items() if FILES[name].splitlines()[-1] not in script.source] == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_says_its_name_its_keys_and_what_it_returns(name: str) -> None:
    """The header explains every key and argument that the script uses."""
    lines = FILES[name].removeprefix("#!lua flags=allow-oom\n").splitlines()
    length = next(place for place, line in enumerate(lines) if not line.startswith("--"))
    header, body = "\n".join(lines[:length]), "\n".join(lines[length:])

    assert header.startswith(f"-- {name.upper()}: ")
    assert re.search(r"^-- returns ", header, re.MULTILINE), "what does it return?"
    for kind in ("KEYS", "ARGV"):
        used = set(re.findall(rf"\b{kind}\[(\d+)\]", body))
        assert used <= set(re.findall(rf"\b{kind}\[(\d+)\]", header)), f"the header does not explain all of {kind}"
