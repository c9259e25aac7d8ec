"""Values that were meant for Python, as JSON can say them."""

from typing import Any

import msgspec

from qserve.wire.codec import Codec

# Never with pickles: a gateway runs no user code.
_codec = Codec(allow_pickle=False, max_bytes=1 << 40)


def plain_value(packed: bytes) -> Any:
    """A packed value in JSON types; what JSON cannot say becomes its repr.

    Raises:
        QServeError: It needs a class, or a pickle, that only Python processes can handle.
    """
    return msgspec.to_builtins(_codec.unpack(packed), enc_hook=repr, str_keys=True)
