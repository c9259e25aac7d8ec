"""The environment variables that a deployment has asked for."""

import os
from typing import Any

from qserve.wire.codec import Codec
from qserve.wire.spec import DeploymentSpec


def set_environment(spec: DeploymentSpec, codec: Codec) -> None:
    """Set the `env_vars` of the deployment's `runtime_env` in this process; call before user code is imported."""
    if spec.ray_actor_options:
        options: Any = codec.unpack(spec.ray_actor_options)
        os.environ.update((options.get("runtime_env") or {}).get("env_vars") or {})
