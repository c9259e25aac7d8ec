"""All examples in one application: `make run`, and what docker-compose.yml serves unless QSERVE_APP says otherwise."""

from examples.digits import classifier, digits, explainer, preprocessor
from examples.fastapi_ingress import Notes
from examples.hello import Counter, hello
from examples.noop import Noop

__all__ = ["Counter", "Noop", "Notes", "classifier", "digits", "explainer", "hello", "preprocessor"]
