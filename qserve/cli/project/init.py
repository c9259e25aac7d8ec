"""`qserve init`: a small project that runs and has a test."""

from pathlib import Path
from typing import Final

import click

from qserve.cli.output import Failure, note

_TEMPLATES: Final = Path(__file__).parent / "templates"
_NAMES: Final = ("minimal", "fastapi", "batching", "llm-stream")
_SUFFIX: Final = ".tmpl"
"""What template files end in, so that nobody takes them for modules of qserve."""

_COMMON: Final = {
    "pyproject.toml": '[tool.qserve]\napp = "app"\n\n[tool.pytest.ini_options]\npythonpath = ["."]\n',
    "requirements.txt": "qserve[all]\npytest\n",
}


@click.command()
@click.option("--template", type=click.Choice(_NAMES), default="minimal", show_default=True, help="What to begin with.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=".")
def init(template: str, folder: Path) -> None:
    """Write a small project into FOLDER (this one if it is left out): an application, its test and what they need.

    Files that are there already are not touched; then nothing is written.
    """
    files = {path.name.removesuffix(_SUFFIX): path.read_text() for path in (_TEMPLATES / template).iterdir()}
    files |= {name: text for name, text in _COMMON.items() if name not in files}
    taken = sorted(name for name in files if (folder / name).exists())
    if taken:
        raise Failure(
            f"{folder.resolve()} has {', '.join(taken)} already, so nothing was written. Give another folder: "
            f"`qserve init --template {template} FOLDER`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(files.items()):
        (folder / name).write_text(text)
        note(f"wrote {folder / name}")
    there = "" if folder == Path() else f"cd {folder}; "
    note(f"Next: {there}qserve dev     and in another terminal: {there}pytest")
