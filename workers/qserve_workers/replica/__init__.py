"""One replica: user code between the queue and its callers."""
