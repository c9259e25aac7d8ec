"""Applications: graphs of bound deployments that are deployed, shown and deleted together."""
