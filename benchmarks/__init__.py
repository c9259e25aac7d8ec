"""`make bench`: one table of what qserve costs, against the same handler without a queue."""
