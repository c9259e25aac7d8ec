"""The JSON schema of config files, for editors."""

import json
from typing import Any

from qserve.config_file.sections import ConfigFile
from qserve.wire.autoscaling import IGNORED_NAMES, OTHER_NAMES


def schema_text() -> str:
    """The schema, as a file has it."""
    schema = ConfigFile.model_json_schema()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config file of qserve",
        **{key: value for key, value in _without_titles(schema).items() if key != "title"},
    }
    scaling = schema["$defs"]["AutoscalingConfig"]["properties"]
    for name in sorted(IGNORED_NAMES):
        scaling.setdefault(name, {"description": "Accepted because Ray Serve has it, and without effect."})
    for name, ours in OTHER_NAMES.items():
        scaling[name] = {"description": f"The name that Ray Serve 1.x had for {ours}.", "type": "number"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _without_titles(value: Any) -> Any:
    """What pydantic makes of a schema, without a title for each field, which says nothing that its name does not."""
    if isinstance(value, dict):
        return {
            key: _without_titles(each) for key, each in value.items() if not (key == "title" and isinstance(each, str))
        }
    return [_without_titles(each) for each in value] if isinstance(value, list) else value
