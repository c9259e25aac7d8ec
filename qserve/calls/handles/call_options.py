"""What `handle.options(...)` changes: how a call is made, and the terms of durable calls."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypedDict

from qserve.wire.call_record import Durability, DurableOptions, Priority, make_durable_options, terms_as_given
from qserve.wire.messages import MODEL, NO_META
from qserve.wire.seconds import check_seconds

RetryOn = str | type[BaseException] | Iterable[str | type[BaseException]]


class CallOptions(NamedTuple):
    """The options of a handle. `http_method`, `http_headers`, `shard_key` and `session_id` have no effect."""

    method_name: str = ""
    timeout_s: float | None = None
    http_method: str = "GET"
    http_headers: tuple[tuple[str, str], ...] = ()
    shard_key: str | None = None
    multiplexed_model_id: str = ""
    session_id: str | None = None

    @property
    def meta(self) -> Mapping[str, str]:
        """What goes beside each call."""
        return {MODEL: self.multiplexed_model_id} if self.multiplexed_model_id else NO_META


class Changes(TypedDict, total=False):
    """The arguments of `options()` for every kind of call."""

    timeout_s: float | None
    http_method: str | None
    http_headers: Mapping[str, str] | None
    shard_key: str | None
    multiplexed_model_id: str
    session_id: str | None


class DurableTerms(TypedDict, total=False):
    """The arguments of `options()` for durable calls."""

    timeout_s: float | None
    multiplexed_model_id: str
    delay: float
    retries: int
    backoff: float
    retry_on: RetryOn
    expires: float | None
    priority: Priority
    result_ttl: float
    durability: Durability | None


_WITHOUT_EFFECT = frozenset({"use_new_handle_api", "_prefer_local_routing", "_by_reference", "serialization"})
"""What handles of Ray Serve take besides."""

_SENT = frozenset({"method_name", "multiplexed_model_id"})
_SHORTEST_TIMEOUT_S = 0.001


def changed_options(
    options: CallOptions,
    method_name: str | None,
    changes: dict[str, Any],
    *,
    stream: bool,
    durable: bool,
    terms: DurableOptions | None = None,
) -> tuple[CallOptions, DurableOptions | None]:
    """The options of a handle that is made from another one, and those of its durable calls if it makes such calls.

    Args:
        terms: Those of the durable calls that the other one makes, if it makes such. What is not given anew stays.

    Raises:
        ValueError, TypeError: An option is not known or has an impossible value, or this kind of call does not have it.
    """
    if stream and durable:
        raise ValueError(
            "stream=True and durable=True exclude each other; iterate the ref of a durable call to get its parts"
        )
    for name in _WITHOUT_EFFECT.intersection(changes):
        del changes[name]
    of_durable = {key: value for key, value in changes.items() if key not in CallOptions._fields}
    given = {key: value for key, value in changes.items() if key not in of_durable and value is not None}
    if method_name is not None:
        given["method_name"] = method_name
    for name in _SENT.intersection(given):
        given[name] = _checked_text(name, given[name])
    if "timeout_s" in given:
        check_seconds("timeout_s", given["timeout_s"], _SHORTEST_TIMEOUT_S)
    if "http_headers" in given:
        given["http_headers"] = tuple(dict(given["http_headers"]).items())
    changed = options._replace(**given)
    before = terms_as_given(terms) if terms is not None and durable else {}
    if "timeout_s" in given:
        before.pop("expires", None)
    return changed, _durable_options(durable, changed, before, of_durable)


def _checked_text(option: str, text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{option} is a string, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{option}={text!a} cannot be sent: it contains half a character") from None
    return str.__str__(text)  # what is sent is no enum and no numpy.str_


def _durable_options(
    durable: bool, changed: CallOptions, before: dict[str, Any], given: dict[str, Any]
) -> DurableOptions | None:
    if unknown := given.keys() - DurableTerms.__annotations__.keys():
        raise TypeError(f"options() got unknown options: {', '.join(sorted(unknown))}")
    if not durable:
        if given:
            raise ValueError(f"{', '.join(given)}: this is for calls with durable=True only")
        return None
    terms = {**before, **given}
    if terms.get("expires") is None and changed.timeout_s is not None:
        terms["expires"] = changed.timeout_s
    return make_durable_options(**terms)
