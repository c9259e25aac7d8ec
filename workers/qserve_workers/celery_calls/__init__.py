"""Calls that Celery clients make."""
