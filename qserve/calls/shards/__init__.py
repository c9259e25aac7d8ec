"""The clients of one process, where Redis is a cluster."""
