"""What crosses the wire: messages as inert data, and values as bytes."""
