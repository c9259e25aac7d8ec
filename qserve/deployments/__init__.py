"""Describing deployments, and getting them to run."""
