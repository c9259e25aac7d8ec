"""Ids of the entries of streams, which Redis gives in rising order: `milliseconds-number`."""


def order(entry: bytes) -> tuple[int, int]:
    """What entry ids are compared by."""
    ms, _, sequence = entry.partition(b"-")
    return int(ms), int(sequence)
