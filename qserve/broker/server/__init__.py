"""The Redis server: which one it is, how it is reached, whether it is fit, and what its users may do."""
