"""Bodies of requests and responses that are too large for a queue, or not there yet."""
