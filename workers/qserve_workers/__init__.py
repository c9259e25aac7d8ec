"""The Celery side of qserve: `celery -A qserve_workers worker -Q Echo --concurrency 2` serves the deployment Echo."""

from qserve_workers.celery_app import celery

__all__ = ["celery"]
