"""The codec with which arguments and results are packed, handles among them."""

from functools import lru_cache

from qserve.calls.client import Client
from qserve.calls.handles.base_handle import handle_from_wire
from qserve.wire.codec import Codec


def codec_of(client: Client) -> Codec:
    """The codec for the calls of a client, which may use pickle only if the frames are signed."""
    return _codec(client.signer.signs, client.settings.max_value_bytes, client.settings.out_of_line_bytes)


@lru_cache(maxsize=8)
def _codec(signs: bool, max_bytes: int, large: int) -> Codec:
    return Codec(allow_pickle=signs, max_bytes=max_bytes, make_handle=handle_from_wire, large=large + 1)
