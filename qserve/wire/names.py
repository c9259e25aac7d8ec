"""The rule for names of deployments, namespaces and schedules."""

import re

NAME_PATTERN = r"[A-Za-z0-9_.-]{1,63}"

_NAME = re.compile(NAME_PATTERN)


def is_name(name: str) -> bool:
    """Whether a deployment, namespace or schedule may be called so; such names are safe in keys, paths and URLs."""
    return _NAME.fullmatch(name) is not None
