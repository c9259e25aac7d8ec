"""The HTTP gateway: it matches paths, puts requests on the queues of deployments, and turns replies into responses."""
