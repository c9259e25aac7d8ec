"""The HTTP gateway: matches the path, puts the request on the deployment's queue, turns the reply into a response."""
