"""The commands about config files, and what `run` and `deploy` take from one besides the applications."""
