"""What handles are made of: their options, how they travel, and the kinds of them beside the plain ones."""
