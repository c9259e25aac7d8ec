"""Packed values, which were meant for Python, as JSON."""

import msgspec

from qserve.wire.codec import Codec

# Never with pickles: a gateway runs no user code.
_codec = Codec(allow_pickle=False, max_bytes=1 << 40)


def plain_value(packed: bytes) -> msgspec.Raw:
    """Unpack a value into JSON; what JSON cannot express becomes its repr.

    Raises:
        QServeError: It is pickled or needs a class, and the gateway runs no user code.
    """
    value = _codec.unpack(packed)
    try:
        plain = msgspec.to_builtins(value, enc_hook=repr, str_keys=True)
        return msgspec.Raw(msgspec.json.encode(plain))
    except (TypeError, UnicodeEncodeError):  # tuples as keys, or half a surrogate pair
        return msgspec.Raw(msgspec.json.encode(repr(value)))
