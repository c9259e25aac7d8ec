"""What operators see of an instance, and what they do to it."""
