"""Packed values, which were meant for Python, as JSON."""

from typing import Any

import msgspec

from qserve.wire.codec import Codec

# Never with pickles: a gateway runs no user code.
_codec = Codec(allow_pickle=False, max_bytes=1 << 40)


def plain_value(packed: bytes) -> Any:
    """Unpack a value into JSON types; what JSON cannot express becomes its repr.

    Raises:
        QServeError: It is pickled or needs a class, and the gateway runs no user code.
    """
    return msgspec.to_builtins(_codec.unpack(packed), enc_hook=repr, str_keys=True)
