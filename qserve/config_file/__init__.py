"""The config file: what an instance should serve, written down. Its format is that of Ray Serve."""
