"""User code: constructed once, entered through one guarded way, called by Python callers and over ASGI."""
