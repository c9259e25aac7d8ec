"""The front door: what is let in, and for how long."""
