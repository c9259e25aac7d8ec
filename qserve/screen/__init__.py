"""What a terminal shows of an instance that runs from it."""
