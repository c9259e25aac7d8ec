"""What was: calls by state, counts of ten seconds each, troubles, and what operators did."""
