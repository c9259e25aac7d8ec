"""Tables of the documentation that follow from declarations in the code; `make tables` writes them."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from qserve.wire.options import DECLARED, DeclaredOption

CONFIGURATION = Path(__file__).parents[2] / "docs/configuration.md"


def deployment_options() -> str:
    """The options of a deployment, one a row."""
    return _table("option", ((each.names, _default_of(each), each.option.text) for each in DECLARED))


TABLES: dict[str, Callable[[], str]] = {"deployment options": deployment_options}


def with_tables(text: str) -> str:
    """A page with its tables made anew; each stands between `<!-- table: NAME -->` and `<!-- end of table -->`."""

    def renew(found: re.Match[str]) -> str:
        return f"{found[1]}{TABLES[found[2]]()}{found[3]}"

    return re.sub(r"(<!-- table: (.*?) -->\n).*?(<!-- end of table -->)", renew, text, flags=re.DOTALL)


def _table(kind: str, rows: Iterable[tuple[Iterable[str], str, str]]) -> str:
    head = f"| {kind} | default | meaning |\n|---|---|---|\n"
    return head + "".join(
        f"| {', '.join(f'`{name}`' for name in names)} | {default} | {text} |\n" for names, default, text in rows
    )


def _default_of(option: DeclaredOption) -> str:
    if option.option.shown:
        return option.option.shown
    return "none" if option.default is None else f"`{option.default:{'g' if type(option.default) is float else ''}}`"


if __name__ == "__main__":
    CONFIGURATION.write_text(with_tables(CONFIGURATION.read_text()))
