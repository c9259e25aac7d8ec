"""Durable calls: submitting them, scheduling them, and what was given up on."""
