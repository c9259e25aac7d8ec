"""The front door: the connections of a listener, and what is let in, before any application code."""
