"""What YAML takes for something else than text, because it stands without quotes: `PORT: 8000`, `NO: Norway`."""

from collections.abc import Iterator
from typing import Any, Final

import yaml

_BOOL: Final = "tag:yaml.org,2002:bool"
_KINDS: Final = {
    _BOOL: "a truth value",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "no value",
    "tag:yaml.org,2002:timestamp": "a date",
}


def taken_for(node: yaml.Node | None) -> str | None:
    """A sentence about a value that YAML does not take for text; None where it does, or where it is a list or so."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _KINDS:
        return None
    return f"YAML takes {node.value or 'nothing'} for {_KINDS[node.tag]}. For text, {_quoted(node)}"


def key_taken_for(mapping: yaml.Node | None, key: object) -> tuple[str, str] | None:
    """The text of the key that YAML took for this one, and a sentence about it."""
    for node, _ in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
        if isinstance(node, yaml.ScalarNode) and node.tag in _KINDS and _constructed(node) == key:
            return node.value, _said(node)
    return None


def keys_changed_silently(node: yaml.Node, place: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Keys such as `on` and `NO`, which YAML takes for true and false wherever they stand: their places, and why."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == _BOOL and key.value.lower() not in ("true", "false"):
                yield (*place, key.value), _said(key)
            yield from keys_changed_silently(value, (*place, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from keys_changed_silently(value, (*place, index))


def _said(key: yaml.ScalarNode) -> str:
    return f"YAML takes the key {key.value} for {_KINDS[key.tag]}. For text, {_quoted(key)}"


def _quoted(node: yaml.ScalarNode) -> str:
    return f'put it between quotes: "{node.value}"'


def _constructed(node: yaml.ScalarNode) -> object:
    return yaml.SafeLoader("").construct_object(node)
