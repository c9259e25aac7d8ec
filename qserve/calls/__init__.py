"""Calling: handles, references, and the client that sends calls and receives replies."""
