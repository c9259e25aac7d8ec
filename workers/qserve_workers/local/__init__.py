"""Deployments that run in the process that calls them, for unit tests of applications: see `qserve.testing.local`."""
