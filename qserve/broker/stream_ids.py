"""Ids that Redis gives to the entries of a stream: milliseconds on its clock, a dash, a sequence number."""


def order(stream_id: bytes | str) -> tuple[int, int]:
    """What ids are compared by; the dash and the number may be missing."""
    text = stream_id.decode() if isinstance(stream_id, bytes) else stream_id
    ms, _, sequence = text.partition("-")
    return int(ms), int(sequence or 0)
