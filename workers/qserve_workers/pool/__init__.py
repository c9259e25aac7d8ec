"""The pool: how a Celery worker keeps its replicas running."""
