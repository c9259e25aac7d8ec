"""Applications to try qserve with; `make run` serves them all."""
