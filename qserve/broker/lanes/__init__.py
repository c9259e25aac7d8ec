"""Of a cluster: the connections of a process to its servers, which the shards of a server share."""
