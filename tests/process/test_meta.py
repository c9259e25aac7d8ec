"""What hooks of a caller say beside a call: under its signature, and no byte of it where they say nothing."""

from qserve.calls.client import Client
from qserve.settings import Settings
from qserve.wire.call_record import NEVER_MS, DurableCall, DurableOptions, Terms, decode_durable_call
from qserve.wire.messages import PYTHON, Call, decode_call, encode

META = {"trace": "00-1", "tenant": "ä"}


def frame(client: Client, meta: dict[str, str]) -> tuple[str, bytes]:
    call = client.prepare(
        "Echo",
        kind=PYTHON,
        method="m",
        payload=b"p",
        timeout_s=2.0,
        safe=True,
        on_outcome=lambda _: None,
        meta=meta,
    )
    return call.id, client.signer.open(call.frame)


def durable_frame(client: Client, meta: dict[str, str]) -> tuple[str, bytes]:
    made = client.durable.submissions.prepare(
        "Echo", kind=PYTHON, method="m", payload=b"p", options=DurableOptions(), on_admitted=lambda _: None, meta=meta
    )
    return made.call.id, client.signer.open(made.frame)


def test_of_a_call(settings: Settings) -> None:
    client = Client(settings)
    call_id, bare = frame(client, {})
    assert bare == encode(Call(call_id, "Echo", client.id, 2000, PYTHON, "m", True, b"p"))
    call_id, said = frame(client, META)
    read = decode_call(said)
    assert (read.id, read.payload, read.meta) == (call_id, b"p", META)
    assert decode_call(bare).meta == {}


def test_of_a_durable_call(settings: Settings) -> None:
    client = Client(settings)
    call_id, bare = durable_frame(client, {})
    head = (call_id, "Echo", "", NEVER_MS, PYTHON, "m", True, b"p", False)
    assert bare == encode(DurableCall(*head, terms=Terms()))
    call_id, said = durable_frame(client, META)
    read = decode_durable_call(said)
    assert (read.id, read.terms, read.meta) == (call_id, Terms(), META)
