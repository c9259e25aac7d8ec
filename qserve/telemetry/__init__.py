"""What qserve tells about itself: log records, and traces."""
