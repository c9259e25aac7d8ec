"""Tables of the documentation that follow from declarations in the code; `make tables` writes them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qserve.config_file.json_schema import schema_text
from qserve.deployments.http_options import HTTPOptions
from qserve.settings import Settings, Shown
from qserve.wire.options import DECLARED, DeclaredOption

CONFIGURATION = Path(__file__).parents[2] / "docs/configuration.md"
CONFIG_FILE_SCHEMA = CONFIGURATION.parent / "reference/config-file.schema.json"


def deployment_options() -> str:
    """The options of a deployment, one a row."""
    return _table("option", ((each.names, _default_of(each), each.option.text) for each in DECLARED))


def settings() -> str:
    """The settings of the environment, one a row."""
    return _table("variable", _rows_of(Settings, lambda name: f"QSERVE_{name.upper()}", _in_the_environment))


def http_options() -> str:
    """The options of HTTP, one a row."""
    return _table("option", _rows_of(HTTPOptions, str, lambda _, default: f"`{default or json.dumps(default)}`"))


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "deployment options": deployment_options,
    "http options": http_options,
}


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


def _rows_of(
    model: type[BaseModel], name_of: Callable[[str], str], default_of: Callable[[str, Any], str]
) -> Iterator[tuple[tuple[str], str, str]]:
    for name, field in model.model_fields.items():
        said = next((each.text for each in field.metadata if isinstance(each, Shown)), "")
        yield (name_of(name),), said or default_of(name, field.default), field.description or ""


def _default_of(option: DeclaredOption) -> str:
    if option.option.shown:
        return option.option.shown
    return "none" if option.default is None else f"`{option.default:{'g' if type(option.default) is float else ''}}`"


def _in_the_environment(name: str, default: Any) -> str:
    """A default as it is written in the environment."""
    if default in ("", None):
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if name.endswith("_bytes"):
        size = next(
            f"{default // factor} {unit}"
            for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
            if default >= factor
        )
        return f"`{default}` ({size})"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


if __name__ == "__main__":
    CONFIG_FILE_SCHEMA.write_text(schema_text())
    CONFIGURATION.write_text(with_tables(CONFIGURATION.read_text()))
