"""From the text of a config file to its sections, or to what is wrong with it, where, and in which line."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from qserve.config_file.logging_config import LoggingConfig
from qserve.config_file.quotes import key_taken_for, keys_changed_silently, taken_for
from qserve.config_file.sections import (
    ApplicationSection,
    ConfigFile,
    DeploymentSection,
    HTTPSection,
)
from qserve.deployments.option_errors import sentence
from qserve.errors import ConfigurationError
from qserve.wire.autoscaling import AutoscalingConfig

Place = tuple[str | int, ...]
"""Where something is in a file: the keys and indexes that lead there."""

_SECTIONS: Final[dict[Place, type[BaseModel]]] = {
    (): ConfigFile,
    ("http_options",): HTTPSection,
    ("logging_config",): LoggingConfig,
    ("applications",): ApplicationSection,
    ("applications", "deployments"): DeploymentSection,
    ("applications", "deployments", "autoscaling_config"): AutoscalingConfig,
}
"""The section that is at a place, with indexes left out."""
_OLD_KEYS: Final = {"import_path", "runtime_env", "deployments"}


class FileWithLines:
    """A config file, to say where in it something is wrong.

    Attributes:
        config: What the file says.
    """

    config: ConfigFile

    def __init__(self, path: Path, root: yaml.Node) -> None:
        self._path = path
        self._root = root

    def mistakes(self, mistakes: Iterable[tuple[Place, str]]) -> ConfigurationError:
        """An error with a line for each mistake."""
        numbered = sorted({(self._line_of(place), said) for place, said in mistakes})
        lines = [f"  line {number}: {said}" for number, said in numbered]
        return ConfigurationError("\n".join([f"{self._path} cannot be deployed:", *lines]))

    def existing(self, place: Place) -> Place:
        """The beginning of a place that is there in the file."""
        node, found = self._root, list[str | int]()
        for step in place:
            inner = _step(node, step)
            if inner is None:
                break
            node = inner[1]
            found.append(step)
        return tuple(found)

    def node_at(self, place: Place) -> yaml.Node | None:
        """What is at a place; None if there is nothing."""
        node: yaml.Node | None = self._root
        for step in place:
            inner = _step(node, step)
            if inner is None:
                return None
            node = inner[1]
        return node

    def _line_of(self, place: Place) -> int:
        node, line = self._root, self._root.start_mark.line
        for step in place:
            inner = _step(node, step)
            if inner is None:
                break
            line, node = inner[0].start_mark.line, inner[1]
        return line + 1


def read_config_file(path: Path) -> FileWithLines:
    """Read and check a config file.

    Raises:
        ConfigurationError: It is not there, it is no YAML, or it says what is not possible.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigurationError(f"The config file {str(path)!r} cannot be read: {reason}.") from exc
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        mistaken = list(_mistaken_keys(root))
    except (yaml.YAMLError, ValueError) as exc:  # the latter for 2001-99-99, which looks like a date
        raise ConfigurationError(f"{path} is no YAML: {exc}") from exc
    except RecursionError:
        raise ConfigurationError(
            f"{path} cannot be read: it is nested too deeply, or an alias (`*name`) stands within what it stands for."
        ) from None
    if root is None or not isinstance(values, dict):
        raise ConfigurationError(
            f"{path} has to be a mapping with `applications:`, a list. `qserve build MODULE:NAME` writes an example."
        )
    file = FileWithLines(path, root)
    if mistaken:
        raise file.mistakes(mistaken)
    try:
        file.config = ConfigFile.model_validate(values)
    except ValidationError as exc:
        raise file.mistakes(_mistakes_of(exc, file, values)) from None
    return file


def shown(place: Place) -> str:
    """A place as it is written: `applications[0].deployments[2].num_replicas`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


def _mistakes_of(exc: ValidationError, file: FileWithLines, values: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    if "applications" not in values and _OLD_KEYS & values.keys():
        yield (), "The file is of one application. Put it into a list: `applications:`, and below it `- name: default`."
        return
    seen = set[Place]()
    for error in exc.errors(include_url=False, include_context=False):
        place = file.existing(error["loc"])
        node = file.node_at(place)
        if key := key_taken_for(node, error["input"]) if _is_of_key(error) else None:
            yield (*place, key[0]), f"{shown(place) or 'the file'}: {key[1]}"
            continue
        if place in seen and error["type"] != "missing":
            continue  # another member of a union
        seen.add(place)
        if error["type"] == "string_type" and (taken := taken_for(node)):
            yield place, f"{shown(place)}: {taken}"
            continue
        full = (*place, error["loc"][-1]) if error["type"] == "missing" else place
        holder = tuple(step for step in place[:-1] if isinstance(step, str))
        section = _SECTIONS.get(holder)
        yield place, sentence(error, shown(full) or "the file", section.model_fields if section else ())


def _is_of_key(error: Any) -> bool:
    return bool(error["type"] == "invalid_key" or error["loc"][-1:] == ("[key]",))


def _mistaken_keys(root: yaml.Node | None) -> Iterator[tuple[Place, str]]:
    if root is None:
        return
    yield from _doubled_keys(root)
    for place, said in keys_changed_silently(root):
        yield place, f"{shown(place[:-1]) or 'the file'}: {said}"


def _doubled_keys(node: yaml.Node, place: Place = ()) -> Iterator[tuple[Place, str]]:
    if isinstance(node, yaml.MappingNode):
        seen = set[str]()
        for key, value in node.value:
            inner = (*place, str(key.value))
            if key.value in seen:
                yield inner, f"{shown(inner)} is there again in line {key.start_mark.line + 1}."
            seen.add(key.value)
            yield from _doubled_keys(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _doubled_keys(value, (*place, index))


def _step(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """Where a step leads from a node: to a key, or an item of a list, and to its value."""
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if key.value == step), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step]
    return None
