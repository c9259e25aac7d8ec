"""What each page shows. A page takes time for what is on it, whatever is queued. Everything here blocks on Redis."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

from qserve.broker.history.audit import read_deeds
from qserve.broker.history.buckets import read_buckets
from qserve.broker.history.call_index import ABOVE_ALL, STATES, Entry, count_states
from qserve.broker.history.totals import read_totals
from qserve.broker.history.troubles import read_troubles
from qserve.broker.instance.queue_facts import read_queue_facts
from qserve.broker.instance.state import State
from qserve.broker.server.memory import read_memory
from qserve.broker.server.redis_checks import check_server
from qserve.durable.dead_letters import DeadLetters
from qserve.durable.schedules import Schedules, next_moment
from qserve.errors import DeploymentNotFound, QServeError
from qserve.operating.call_contents import PARTS_SHOWN, contents_of
from qserve.operating.call_search import CallFilter, find_call, find_calls, known_calls
from qserve.operating.call_tree import family_of
from qserve.operating.loads import curves, load_of
from qserve.operating.nodes import place_of
from qserve.operating.overview import deployed_of, read_overview
from qserve.operating.timeline import timeline
from qserve.settings import Settings
from qserve.tracebacks import gist
from qserve.wire.codec import Codec
from qserve.wire.spec import DeploymentSpec, pause_of
from qserve_gateway.console.sessions import PATH, Visitor

ROWS: Final = 50
_MOST_NAMES: Final = 200
"""Pages about all deployments look at so many; names lead to the others."""
_RANGES: Final = {"10m": 600, "1h": 3600, "6h": 21_600, "24h": 86_400, "72h": 259_200}
_TILES_S: Final = 3600
"""What the figures of a deployment are about at most; plots show more."""
_TYPED: Final = "go"
"""In the path of a call whose id somebody has typed into a form."""
SINCE: Final = {"": 0, "5m": 300, "1h": 3600, "24h": 86_400, "7d": 604_800}


class BadFilter(ValueError):
    """A filter has a value that it cannot have; the text says which ones it can."""


class Asked(NamedTuple):
    """What somebody wants to see."""

    path: str
    query: Mapping[str, str]
    visitor: Visitor


_NOT_SHOWN: Final = frozenset({"target", "init_args", "name", "revision", "user_config", "declared"})

_MUCH_MEMORY: Final = 0.8

_codec = Codec(allow_pickle=False, max_bytes=1 << 24)

View = Callable[[Asked, str], dict[str, Any]]


class Pages:
    """Finds what is on a page. Thread-safe."""

    def __init__(self, state: State, settings: Settings) -> None:
        self._state = state
        self._settings = settings
        self._hidden = [word.strip().lower() for word in settings.console_hidden_names.split(",") if word.strip()]
        self._views: list[tuple[re.Pattern[str], str, View]] = [
            (re.compile(pattern), template, view)
            for pattern, template, view in (
                (r"/?", "overview.html", self._overview),
                (r"/deployments/([^/]+)", "deployment.html", self._deployment),
                (r"/calls", "calls.html", self._calls),
                (r"/calls/([^/]+)", "call.html", self._call),
                (r"/troubles", "troubles.html", self._troubles),
                (r"/dead", "dead.html", self._dead),
                (r"/schedules", "schedules.html", self._schedules),
                (r"/cluster", "cluster.html", self._cluster),
                (r"/audit", "audit.html", self._audit),
            )
        ]

    def find(self, asked: Asked) -> tuple[str, dict[str, Any]] | None:
        """The template of a page and what it shows; None if there is no such page.

        Raises:
            BadFilter: A filter has an impossible value.
            DeploymentNotFound, CallNotFound: What the page is about does not exist.
            BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
        """
        for pattern, template, view in self._views:
            match = pattern.fullmatch(asked.path)
            if match is not None:
                facts = view(asked, match[1] if match.groups() else "")
                here = PATH + quote(asked.path) + (f"?{urlencode(asked.query)}" if asked.query else "")
                common = {"visitor": asked.visitor, "path": asked.path, "query": asked.query, "here": here}
                return template, facts | common
        return None

    def series(self, name: str, span: str) -> dict[str, Any]:
        """The curves of a deployment; raises `BadFilter` for an unknown span."""
        length = _choice("range", span, _RANGES)
        now, [buckets] = read_buckets(self._state.redis, self._state.keys, [name], length)
        return dict(curves(buckets, now, length))

    def _overview(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked, "q", "page", "sort")
        search = asked.query.get("q", "").lower()
        names = [name for name in self._state.names() if search in name.lower()]
        page = _page(asked)
        shown = slice(page * ROWS, (page + 1) * ROWS)
        sort = asked.query.get("sort", "name")
        keys: dict[str, Callable[[Any], Any]] = {
            "name": lambda row: row["name"],
            "rate": lambda row: -row["rate"],
            "queued": lambda row: -row["queued"],
            "failed": lambda row: -row["failed"],
        }
        key = _choice("sort", sort, keys)
        if sort == "name":
            rows = read_overview(self._state, names[shown])
        else:  # whatever comes first may be anywhere
            rows = sorted(read_overview(self._state, names), key=key)[shown]
        totals = {key: sum(row[key] for row in rows) for key in ("rate", "queued", "running", "failed", "dead")}
        return {
            "rows": rows,
            "count": len(names),
            "page": page,
            "pages": -(-len(names) // ROWS),
            "search": search,
            "sort": sort,
            "totals": totals,
            "warnings": list(self._warnings()),
            "serving": sum(row["serving"] for row in rows),
            "wanted": sum(row["wanted"] for row in rows),
        }

    def _warnings(self) -> Iterator[str]:
        """What keeps all deployments from working."""
        if not self._state.observed.nodes():
            yield "No node is alive, so calls wait and are not run. Start one with `qserve start`."
        if self._state.keys.shards > 1:  # that would be a connection to each server for each look
            return
        for memory in read_memory(self._state.redis):
            share = memory.used / memory.limit
            if share > _MUCH_MEMORY:
                yield f"Redis uses {share:.0%} of its memory. At the limit it refuses calls: raise its maxmemory."

    def _deployment(self, asked: Asked, name: str) -> dict[str, Any]:
        _known(asked, "range")
        span = asked.query.get("range", "1h")
        length = _choice("range", span, _RANGES)
        rows = read_overview(self._state, [name])
        [facts] = read_queue_facts(self._state.redis, self._state.keys, [name])
        deployed = deployed_of(self._state, facts)
        if not rows or deployed is None:
            raise DeploymentNotFound(f"there is no deployment {name[:80]!r}")
        _, [buckets] = read_buckets(self._state.redis, self._state.keys, [name], min(length, _TILES_S))
        spec = deployed.spec
        troubles = read_troubles(self._state.redis, self._state.keys, [name], most=8)
        [counts] = count_states(self._state.redis, self._state.keys, [name])
        [totals] = read_totals(self._state.redis, self._state.keys, [name])
        return {
            "row": rows[0],
            "spec": spec,
            "generation": deployed.generation,
            "range": span,
            "ranges": list(_RANGES),
            "load": load_of(buckets, min(length, _TILES_S)),
            "counts": counts,
            "died": totals.get("replicas died", 0),
            "options": _options(spec),
            "troubles": _shown(troubles),
            "replicas": sorted(facts.replicas, key=lambda replica: (replica.host, replica.pid)),
            "former": self._state.former(name),
            "due": facts.due,
            "import_path": spec.target.import_path,
        }

    def _calls(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked, "state", "deployment", "method", "error", "key", "since", "before", "id")
        query = asked.query
        since = query.get("since", "")
        wanted = CallFilter(
            (query["state"],) if query.get("state") else (),
            *(query.get("deployment", "").strip(), query.get("method", "").strip(), query.get("error", "").strip()),
            key=query.get("key", "").strip(),
            since=time.time() - length if (length := _choice("since", since, SINCE)) else 0.0,
            before=_before(query.get("before", "")),
        )
        names = self._state.names()
        try:
            found = find_calls(self._state, wanted, ROWS)
        except ValueError as exc:
            raise BadFilter(str(exc)) from exc
        chosen = [wanted.deployment] if wanted.deployment else names
        counted = count_states(self._state.redis, self._state.keys, chosen[:_MOST_NAMES])
        more = None
        if found.next_before is not None:
            at, last = found.next_before
            more = "?" + urlencode({**query, "before": f"{at:.3f}-{last}"})
        return {
            "found": found,
            "wanted": wanted,
            "states": STATES,
            "names": names,
            "since": since,
            "sinces": list(SINCE),
            "counts": {each: sum(count[each] for count in counted) for each in STATES},
            "more": more,
            "first": _first_of(chosen),
        }

    def _call(self, asked: Asked, call_id: str) -> dict[str, Any]:
        _known(asked, "id")
        if call_id == _TYPED:
            call_id = asked.query.get("id", "").strip()
        call = find_call(self._state, call_id)
        contents = contents_of(self._state, call, self._hidden) if asked.visitor.may_act else None
        return {
            "call": call,
            "contents": contents,
            "parts_shown": PARTS_SHOWN,
            "steps": timeline(self._state, call.id),
            "family": family_of(self._state, call),
        }

    def _troubles(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked, "deployment", "what", "before")
        name, what = asked.query.get("deployment", ""), asked.query.get("what", "")
        kinds = {kind: kind for kind in ("", "failed", "slow", "refused", "gave up", "lost", "died", "stacks")}
        _choice("what", what, kinds)
        before = asked.query.get("before", "") or "+"
        if before != "+" and re.fullmatch(r"\d{1,16}-\d{1,16}", before) is None:
            raise BadFilter("before is the id of a note, such as 1700000000000-0")
        names = self._state.names()
        found = read_troubles(self._state.redis, self._state.keys, [name] if name else names[:_MOST_NAMES], before, 200)
        rows = [note for note in found if not what or note[2].what == what][:ROWS]
        return {
            "rows": _shown(rows),
            "names": names,
            "name": name,
            "what": what,
            "kinds": [kind for kind in kinds if kind],
            "more": "?" + urlencode({**asked.query, "before": rows[-1][0]}) if len(rows) == ROWS else None,
            "first": _first_of([name] if name else names),
        }

    def _dead(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked, "deployment")
        name = asked.query.get("deployment", "")
        letters = DeadLetters(self._state, 0)
        names = self._state.names()
        chosen = [name] if name else names
        found = [letter for each in chosen[:_MOST_NAMES] for letter in letters.newest(each, 200 if name else ROWS)]
        groups: dict[tuple[str, str], list[Any]] = {}
        for letter in found:
            groups.setdefault((letter.deployment, _kind_of(letter.reason)), []).append(letter)
        ordered = sorted(groups.items(), key=lambda group: -max(letter.at for letter in group[1]))
        return {"groups": ordered, "names": names, "name": name, "first": _first_of(chosen)}

    def _schedules(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked)
        schedules = Schedules(self._state)
        paused = {name: pause_of(text) for name, text in schedules.paused().items()}
        now = schedules.now()
        found = list(schedules.all())
        last = known_calls(self._state, [fired.call_id for _, fired in found if fired is not None])
        rows = [(each, fired, next_moment(each, now), paused.get(each.name)) for each, fired in found]
        return {"rows": rows, "last": last}

    def _cluster(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked)
        observed = self._state.observed
        return {
            "nodes": [
                (node, place_of(node), pause_of(node.drained) if node.drained else None)
                for node in sorted(observed.nodes().values(), key=place_of)
            ],
            "gateways": sorted(observed.gateways().values(), key=lambda gateway: gateway.url),
            "events": sorted(observed.counters().items()),
            "findings": check_server(self._state.redis),
        }

    def _audit(self, asked: Asked, _: str) -> dict[str, Any]:
        _known(asked, "before")
        before = asked.query.get("before", "") or "+"
        if before != "+" and re.fullmatch(r"\d{1,16}-\d{1,16}", before) is None:
            raise BadFilter("before is the id of an entry, such as 1700000000000-0")
        rows = read_deeds(self._state.redis, self._state.keys, ROWS, before)
        return {"rows": rows, "more": f"?before={rows[-1][0]}" if len(rows) == ROWS else None}


def _options(spec: DeploymentSpec) -> dict[str, Any]:
    """The options of a deployment, without what may hold secrets: arguments, its configuration, values of variables."""
    options = {name: getattr(spec, name) for name in spec.__struct_fields__ if name not in _NOT_SHOWN}
    packed = options.pop("ray_actor_options")
    if packed:
        try:
            actor: Any = _codec.unpack(packed)
            environment = actor.get("runtime_env") or {}
        except QServeError:  # a pickle among them
            environment = {}
        options["variables"] = ", ".join(environment.get("env_vars") or ()) or None
    return options


def _shown(notes: list[Any]) -> list[tuple[float, str, Any]]:
    return [(int(entry.split("-")[0]) / 1000, name, trouble) for entry, name, trouble in notes]


def _known(asked: Asked, *names: str) -> None:
    for name in asked.query:
        if name not in names:
            allowed = ", ".join(names) or "none"
            raise BadFilter(f"there is no filter {name[:40]!r} here; there are: {allowed}")


def _choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise BadFilter(f"{name} cannot be {value[:40]!r}, but {', '.join(choice for choice in choices if choice)}")
    return choices[value]


def _first_of(names: Sequence[str]) -> int:
    """Of how many deployments a page shows something, where that is not all of them; 0 where it is."""
    return _MOST_NAMES if len(names) > _MOST_NAMES else 0


def _page(asked: Asked) -> int:
    text = asked.query.get("page", "0")
    if not text.isdecimal() or len(text) > 6:
        raise BadFilter(f"page is a number, not {text[:40]!r}")
    return int(text)


def _before(text: str) -> Entry:
    if not text:
        return ABOVE_ALL
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)(?:-(d[0-9a-f]{32}))?", text, re.ASCII)
    if match is None:
        raise BadFilter(f"before is a Unix time, and perhaps the id of a call, not {text[:40]!r}")
    return float(match[1]), match[2] or ""


def _kind_of(reason: str) -> str:
    """Reasons that differ in numbers and ids only are of one kind."""
    return re.sub(r"\b(d[0-9a-f]{32}|0x[0-9a-f]+|\d+)\b", "#", gist(reason))[:200]
