"""All examples in one application: `make run`, and what docker-compose.yml serves unless QSERVE_APP says otherwise."""

from examples.digits import Classifier, Digits, Explainer, Preprocessor
from examples.fastapi_ingress import Notes
from examples.hello import Counter, hello
from examples.noop import Noop

__all__ = ["Classifier", "Counter", "Digits", "Explainer", "Noop", "Notes", "Preprocessor", "hello"]
