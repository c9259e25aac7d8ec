"""Durable calls over HTTP."""
