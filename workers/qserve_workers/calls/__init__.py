"""The calls of a replica: taken from the queue, run, and answered; and those taken over from replicas that are gone."""
