"""What somebody who can write to Redis may put there, and where: a table for whoever tests that nothing comes of it.

`bad_frames` are the frames, `PLACES` the ways in. `push_everywhere` puts all of the first through all of the second.
"""

import base64
import io
import json
import os
import pickle
import pickletools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import redis

from qserve.broker.keys import Keys
from qserve.settings import Settings
from qserve.wire.call_record import DurableCall, Terms
from qserve.wire.messages import (
    ERROR,
    PYTHON,
    VALUE,
    Blob,
    Call,
    Control,
    ErrorInfo,
    HttpRequest,
    HttpResponse,
    Reply,
    Signer,
    encode,
)
from qserve.wire.spec import DeploymentSpec, HttpSettings, MiddlewareSpec, SignedSpec, Target

NESTED = b"\x91" * 100_000 + b"\xc0"
EMPTY_CALL = b"\x92\x90\x80"
_PICKLED = 5


class Touch:
    """Unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class TouchBySystem(Touch):
    """The same through a shell."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def pickles(canary: Path) -> dict[str, bytes]:
    """Pickles of every protocol that make a file when they are loaded."""
    found = {f"pickle protocol {number}": pickle.dumps(Touch(canary), number) for number in range(6)}
    found["pickle, optimised"] = pickletools.optimize(found["pickle protocol 4"])
    found["pickle of os.system"] = pickle.dumps(TouchBySystem(canary))
    made = io.BytesIO()
    cloudpickle.CloudPickler(made).dump(lambda: Path(str(canary)).touch())
    found["cloudpickle of a function"] = made.getvalue()
    found["pickle in base64"] = base64.b64encode(found["pickle protocol 4"])
    return found


def a_call(deployment: str, **changed: Any) -> Call:
    """An unsafe call as a client makes it, or nearly."""
    given: dict[str, Any] = {
        "id": secrets.token_hex(16) + "0",
        "deployment": deployment,
        "reply_to": secrets.token_hex(16),
        "ttl_ms": 60_000,
        "kind": PYTHON,
        "method": "",
        "safe": False,
        "payload": EMPTY_CALL,
    }
    return Call(**given | changed)


def forged(canary: Path) -> dict[str, bytes]:
    """Bodies and frames of somebody without a key."""
    return {
        "nothing": b"",
        "version 0 alone": b"\x00",
        "version 1 alone": b"\x01",
        "spaces": b" " * 64,
        "text": b"hello",
        "JSON": b'{"id": "x", "deployment": "Echo"}',
        "a Redis command": b"*1\r\n$8\r\nFLUSHALL\r\n",
        "Lua": b"return redis.call('FLUSHALL')",
        "a MiB of zeros": bytes(2**20),
        "a MiB of noise": os.urandom(2**20),
        "gzip": b"\x1f\x8b\x08" + bytes(64),
        **pickles(canary),
        **{f"{name}, as if unsigned": b"\x00" + data for name, data in pickles(canary).items()},
        **{f"{name}, as if signed": b"\x01" + bytes(36) + data for name, data in pickles(canary).items()},
    }


def damaged(frame: bytes) -> dict[str, bytes]:
    """A frame of ours with something wrong with it."""
    flips = {"version": 0, "key id": 1, "end of the key id": 4, "signature": 5, "end of the signature": 36, "body": 37}
    sizes = (1, 2, 4, 5, 20, 36, 37, 38, len(frame) // 2, len(frame) - 1)
    return {
        **{f"cut after {size}": frame[:size] for size in sizes},
        **{f"a bit of the {name} flipped": flip(frame, 8 * at) for name, at in flips.items()},
        "the last bit flipped": flip(frame, 8 * len(frame) - 1),
        "one byte more": frame + b"\x00",
        "one byte before": b"\x00" + frame,
        "twice": frame + frame,
        "an old version": b"\x02" + frame[1:],
        "the newest version": b"\xff" + frame[1:],
        "unsigned": b"\x00" + frame[37:],
        "body alone": frame[37:],
        "signature of zeros": frame[:5] + bytes(32) + frame[37:],
        "signature turned round": frame[:5] + frame[5:37][::-1] + frame[37:],
        "another key's id": frame[:1] + b"abcd" + frame[5:],
        "in upper case": frame.upper(),
        "in hexadecimal": frame.hex().encode(),
        "body turned round": frame[:37] + frame[37:][::-1],
    }


def misplaced(signer: Signer, deployment: str, reader: str) -> dict[str, bytes]:
    """What a key of ours has signed, but as something else: captured elsewhere, or made by a program gone wrong.

    Args:
        reader: Process that will read an inbox in which it is put.
    """
    call, stranger = a_call(deployment), secrets.token_hex(16)
    parts: list[Any] = list(msgspec.structs.astuple(call))

    def with_part(index: int, value: Any) -> bytes:
        return encode([*parts[:index], value, *parts[index + 1 :]])

    spec = DeploymentSpec(name="other", target=Target("os:system"), revision="r")
    settings = HttpSettings(middlewares=(MiddlewareSpec(Target("os:system")),))
    request = HttpRequest("GET", "/", b"/", b"", [], "", "http", None, None, "1.1", "r", b"")
    bodies = {
        "a call to another deployment": encode(a_call("another")),
        "a call to a name that is none": encode(a_call("{x}:y")),
        "a durable call that says it is none": encode(
            DurableCall(*msgspec.structs.astuple(a_call(deployment, id="d" + "0" * 32, reply_to="")), terms=Terms())
        ),
        "a reply to another process": encode(Reply(call.id, stranger, VALUE, b"\x01")),
        "an error for another process": encode(Reply(call.id, stranger, ERROR, encode(ErrorInfo("", "x", "os", "")))),
        "a payload": encode(Blob(call.id, EMPTY_CALL)),
        "a control message": encode(Control("cancel", "1-1")),
        "an error": encode(ErrorInfo("", "system", "os", "echo")),
        "a request": encode(request),
        "a response": encode(HttpResponse(200, [], b"")),
        "a spec": encode(SignedSpec(1, spec)),
        "a spec without its generation": encode(spec),
        "HTTP settings": encode(settings),
        "an empty body": b"",
        "nil": b"\xc0",
        "a number": b"\x01",
        "an empty list": b"\x90",
        "an empty map": b"\x80",
        "a text": encode("call"),
        "too few parts": encode(parts[:5]),
        "an id that is a number": with_part(0, 7),
        "a deployment that is bytes": with_part(1, b"Echo"),
        "a time that is text": with_part(3, "soon"),
        "a time that is a fraction": with_part(3, 1.5),
        "a time beyond all numbers": with_part(3, 2**64 - 1)[:-1],
        "a kind that is text": with_part(4, "0"),
        "safe that is a number": with_part(6, 1),
        "a payload that is a list": with_part(7, [1, 2]),
        "text that is no UTF-8": encode(parts).replace(call.id.encode(), b"\xff" * len(call.id)),
        "nested 100,000 deep": NESTED,
        "nested deep in an extra part": b"\x9a" + encode(parts)[1:] + NESTED,
        "a list of 4,294,967,295": b"\xdd\xff\xff\xff\xff",
        "a map of 4,294,967,295": b"\xdf\xff\xff\xff\xff",
        "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff",
        "text of 4 GiB": b"\xdb\xff\xff\xff\xff",
        "an extension of 4 GiB": b"\xc9\xff\xff\xff\xff\x05",
        "a reply to the reader with a list for its payload": encode([call.id, reader, VALUE, [1]]),
        "a control message that is none": encode(Reply("", reader, 3, b"\x93\x01\x02\x03")),
        "a control message nested deep": encode(Reply("", reader, 3, b"\x93\xa5sweep" + NESTED)),
        "a chunk that is none": encode(Reply(call.id, reader, 4, b"\xff" * 9)),
    }
    return {name: signer.seal(body) for name, body in bodies.items()}


def bad_frames(settings: Settings, deployment: str, canary: Path, reader: str = "") -> dict[str, bytes]:
    """More than a hundred frames, by what they are, of which none may come to anything in a namespace that signs.

    Args:
        canary: A file that must not appear.
        reader: Process that will read an inbox in which they are put.
    """
    signer = Signer(settings.secrets)
    good = encode(a_call(deployment))
    elsewhere = Settings(secret=settings.secret, namespace=settings.namespace + "2")
    arguments = [msgspec.msgpack.Ext(_PICKLED, data) for data in pickles(canary).values()]
    pickled_call = a_call(deployment, payload=msgspec.msgpack.encode([arguments, {}]))
    return {
        **forged(canary),
        **{f"{name}: a call": frame for name, frame in damaged(signer.seal(good)).items()},
        **misplaced(signer, deployment, reader),
        "signed with another key": Signer((b"another key",)).seal(good),
        "signed with an empty key": Signer((b"",)).seal(good),
        "signed in another namespace": Signer(elsewhere.secrets).seal(good),
        "not signed": Signer().seal(good),
        "a call with pickled arguments, not signed": Signer().seal(encode(pickled_call)),
        "a call with pickled arguments, signed with another key": Signer((b"another",)).seal(encode(pickled_call)),
    }


def flip(frame: bytes, bit: int) -> bytes:
    """The frame with one bit turned over."""
    at = bit // 8
    return frame[:at] + bytes([frame[at] ^ (1 << bit % 8)]) + frame[at + 1 :]


# Ways in


@dataclass(frozen=True)
class Aim:
    """What the frames are meant for: a deployment and the processes of an instance."""

    keys: Keys
    deployment: str
    processes: tuple[str, ...]


Place = Callable[["redis.Redis", Aim, bytes], object]


def queue(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As an ordinary call."""
    return client.xadd(aim.keys.calls(aim.deployment), {"r": "x", "f": "s", "d": frame})


def durable_queue(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As a durable call that has no record."""
    fields = {"r": "d" + secrets.token_hex(16), "f": "sd", "d": frame, "v": "1"}
    return client.xadd(aim.keys.calls(aim.deployment), fields)  # type: ignore[arg-type]


def odd_queue(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As fields that no client writes."""
    client.xadd(aim.keys.calls(aim.deployment), {b"\xff": frame})
    return client.xadd(aim.keys.calls(aim.deployment), {frame[:64] or b"x": b"d", b"f": frame, b"r": b"", b"q": b"d"})


def inboxes(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As a message to every process."""
    return [client.xadd(aim.keys.inbox(process), {"d": frame}) for process in aim.processes]


def specs(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As what is to be deployed under a name of its own."""
    client.hset(aim.keys.meta("intruder"), mapping={"gen": "1", "spec": frame, "max_queued": "9", "route": "/intruder"})
    client.sadd(aim.keys.deployments, "intruder")
    return client.xadd(aim.keys.log, {"kind": "deploy", "name": "intruder", "gen": "1"})


def names(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As the name of a deployment, and as a change of the state."""
    client.sadd(aim.keys.deployments, frame[:256])
    return client.xadd(aim.keys.log, {b"kind": frame[:256], b"name": frame[:256], b"gen": frame[:256]})


def http_settings(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As what every gateway wraps around its applications."""
    client.set(aim.keys.http_options, frame)
    return client.xadd(aim.keys.log, {"kind": "http"})


def reports(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As what replicas, workers, nodes and gateways say of themselves."""
    keys, stranger = aim.keys, secrets.token_hex(16)
    for report in (keys.replicas(aim.deployment), keys.workers(aim.deployment), keys.nodes, keys.gateways):
        client.hset(report, stranger, frame)
        client.hset(report, b"\xff\xfe", frame)
    return client.set(keys.alive(stranger), frame, px=30_000)


def results(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As payloads and results that travel out of line."""
    for process in aim.processes:
        client.set(aim.keys.payload(process + "0"), frame, px=60_000)
        client.set(aim.keys.payload(process + "0:r"), frame, px=60_000)
    return None


def celery(client: "redis.Redis", aim: Aim, frame: bytes) -> object:
    """As a message in Celery's own queues, in its envelope and bare."""
    prefix = aim.keys.celery_prefix
    for name in ("qserve", aim.deployment):
        client.lpush(f"{prefix}{name}", celery_envelope(frame))
        client.lpush(f"{prefix}{name}", frame)
    return None


def celery_envelope(body: bytes, content_type: str = "application/x-python-serialize") -> bytes:
    """A task as kombu puts it on a Redis list, its body a pickle."""
    task = {"lang": "py", "task": "os.system", "id": secrets.token_hex(8), "argsrepr": "", "root_id": None}
    envelope = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "binary",
        "content-type": content_type,
        "headers": task,
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "qserve"},
            "delivery_mode": 2,
            "delivery_tag": secrets.token_hex(8),
            "priority": 0,
        },
    }
    return json.dumps(envelope).encode()


PLACES: dict[str, Place] = {
    place.__name__: place
    for place in (*(queue, durable_queue, odd_queue, inboxes, specs, names, http_settings, reports, results, celery),)
}


def push_everywhere(client: "redis.Redis", settings: Settings, aim: Aim, canary: Path) -> int:
    """Put every frame through every place; returns how many that were."""
    frames = bad_frames(settings, aim.deployment, canary, aim.processes[0])
    for place in PLACES.values():
        for frame in frames.values():
            place(client, aim, frame)
    return len(frames) * len(PLACES)


def clean_up(client: "redis.Redis", aim: Aim) -> None:
    """Take away what would otherwise lie there for good."""
    keys = aim.keys
    members = client.smembers(keys.deployments)
    client.srem(keys.deployments, *(set(members) - {aim.deployment.encode()}))
    client.delete(keys.meta("intruder"), keys.http_options)
    client.xadd(keys.log, {"kind": "http"})
