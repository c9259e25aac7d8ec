"""The instance as Redis keeps it: what is deployed, which processes are there, and what is left of what was deleted."""
