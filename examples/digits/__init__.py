"""Handwritten digits as a small composed application: preprocess, classify in batches, explain.

qserve run examples.digits
curl -F file=@examples/digits/seven.png http://127.0.0.1:8000/digits/upload
python examples/digits/evaluate.py --url http://127.0.0.1:8000/digits
"""

from examples.digits.app import Classifier, Digits, Explainer, Preprocessor

__all__ = ["Classifier", "Digits", "Explainer", "Preprocessor"]
