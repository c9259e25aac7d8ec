"""Redis users with the least that each kind of process needs; `qserve redis-acl` prints them.

Commands within scripts are checked against the user that runs them, so what scripts do is part of the lists. EVAL is,
too: a server that has lost its scripts is sent them again by whoever finds out, and EVAL can do nothing that its user
cannot do without it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from qserve.broker.keys import Keys

_BASE = "ping select info time role client|id client|setname"
_SCRIPTS = "eval evalsha script|load script|exists"
_OBSERVE = (
    "exists get mget hget hmget hgetall hkeys hlen smembers xlen xrange xrevrange xread xpending zcard lrange "
    "zrevrangebyscore"
)
_CALL = (
    "xadd xdel xack xtrim xinfo|groups pexpire persist pttl set del getdel hset hdel hincrby zadd zrem zrange "
    "zrangebyscore zremrangebyrank lindex lpush lset ltrim hvals xinfo|stream publish rpush blpop"
)
_RESULTS = "celery:celery-task-meta-*"
_HISTORY = "index:* buckets:* totals:* troubles:*"
_CALL_KEYS = f"q:* inbox:* alive:* p:* x:* parts:* call:* idem:* named:* due:* low:* counters {_HISTORY} {_RESULTS}"
_STATE_KEYS = "meta:* deployments log http instance schedules paused_schedules fired drained"
_REPORTS = "hb:* replicas:* workers:* models:* nodes gateways"
_ANY_CALL = f"call:* {_RESULTS}"
_CELERY = (
    "lpush rpush blmove brpop rpop llen lrem lindex lrange sadd srem smembers zadd zrem zrevrangebyscore zscore hset "
    "hsetnx hget hdel hlen setnx expire watch unwatch multi exec discard "
    "publish subscribe unsubscribe psubscribe punsubscribe"
)


@dataclass(frozen=True)
class Role:
    """What one kind of process may do.

    Attributes:
        name: Of the role.
        purpose: Which processes it is for.
        commands: Names of commands, `command|subcommand` for some of one.
        keys: Patterns of keys it reads and writes, without their prefix.
        reads: Patterns of keys it only reads.
        channels: Patterns of channels.
        celery: Uses Celery's own keys and channels, too.
    """

    name: str
    purpose: str
    commands: str
    keys: str = ""
    reads: str = ""
    channels: str = ""
    celery: bool = False


ROLES = (
    Role(
        "gateway",
        "qserve_gateway",
        f"{_BASE} {_SCRIPTS} {_OBSERVE} {_CALL} subscribe unsubscribe",
        keys=f"{_CALL_KEYS} dead:* gateways sampler exporter audit",
        reads=f"{_STATE_KEYS} {_REPORTS} mover:*",
        channels=_ANY_CALL,
    ),
    Role(
        "worker",
        "nodes, Celery workers and their replicas",
        f"{_BASE} {_SCRIPTS} {_OBSERVE} {_CALL} {_CELERY} rename setbit hsetnx hexists sadd srem xclaim xreadgroup "
        "xgroup|create xgroup|delconsumer xinfo|consumers client|unblock",
        keys=f"{_CALL_KEYS} {_STATE_KEYS} {_REPORTS} dead:* mover:* claims:* run_id before sampler exporter audit",
        channels=_ANY_CALL,
        celery=True,
    ),
    Role(
        "deployer",
        "qserve deploy, delete, shutdown, dead and call; programs that deploy",
        f"{_BASE} {_SCRIPTS} {_OBSERVE} {_CALL} sadd srem hexists xgroup|create",
        keys=f"{_CALL_KEYS} {_STATE_KEYS} {_REPORTS} dead:* audit",
        reads="mover:*",
        channels=_ANY_CALL,
    ),
    Role(
        "client",
        "programs that call deployments through handles",
        f"{_BASE} {_SCRIPTS} {_OBSERVE} {_CALL}",
        keys=_CALL_KEYS,
        reads=f"{_STATE_KEYS} {_REPORTS} mover:*",
        channels=_ANY_CALL,
    ),
    Role(
        "metrics",
        "qserve status, top and doctor, and what watches an instance",
        f"{_BASE} {_OBSERVE} xinfo|groups",
        reads=f"q:* due:* low:* dead:* alive:* {_HISTORY} audit counters {_STATE_KEYS} {_REPORTS}",
    ),
)


def rules(role: Role, keys: Keys, passwords: Iterable[str], db: int = 0) -> list[str]:
    """The rules for the user of a role, in the form that ACL SETUSER and files of users take.

    Args:
        keys: Of the namespace that it is for; those of a cluster give rights to all of its shards.
        passwords: As rules: `>PASSWORD` or `#` and its SHA-256.
        db: Number of the database, which stands in the names of Celery's channels.
    """
    prefixes, celery = [keys.base], keys.celery_prefix
    common: tuple[str, ...] = ()
    if keys.shards > 1:
        prefixes.append(f"qs:{{{keys.namespace}/*}}:")
        common = (f"~{prefixes[1]}", f"{'~' if 'deployments' in role.keys else '%R~'}{keys.shard_count}")
    written = [f"~{prefix}{pattern}" for prefix in prefixes for pattern in role.keys.split()]
    written += [*([f"~{celery}*"] if role.celery else ()), *common]
    read = [f"%R~{prefix}{pattern}" for prefix in prefixes for pattern in role.reads.split()]
    channels = [f"&{prefix}{pattern}" for prefix in prefixes for pattern in role.channels.split()]
    if role.celery:
        # A worker subscribes to a pattern, and patterns are allowed by their very text only.
        channels += [f"&{celery}*", f"&{celery}/{db}.qserve.pidbox"]
    commands = [f"+{command}" for command in dict.fromkeys(role.commands.split())]
    if keys.shards > 1:
        commands.append("+cluster|slots")
    given = ["on", "sanitize-payload", *passwords, *written, *read, "resetchannels", *channels, "-@all", *commands]
    if read and "+evalsha" in commands:
        # Redis takes every key that a script is given for written to. This selector lets it be given; what the script
        # does with it is checked once more.
        given += ["(+eval", "+evalsha", *written, *(key.removeprefix("%R") for key in read[:-1])]
        given += [f"{read[-1].removeprefix('%R')})"]
    return given


def hashed(password: str) -> str:
    """The rule for a password, which holds its SHA-256 instead of the password."""
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"
