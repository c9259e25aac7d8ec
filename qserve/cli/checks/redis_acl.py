"""`qserve redis-acl`: users of the Redis server with few rights."""

import os
import secrets

import click

from qserve.broker.keys import Keys
from qserve.broker.server.acl import ROLES, Role, hashed, rules
from qserve.broker.server.address import SHARDS
from qserve.cli.output import note
from qserve.wire.names import is_name


@click.command("redis-acl")
@click.option(
    "--namespace", envvar="QSERVE_NAMESPACE", default="default", show_default=True, help="Namespace of the instance."
)
@click.option("--prefix", default="qserve-", show_default=True, help="The beginning of the users' names.")
@click.option("--db", default=0, show_default=True, help="Number of the database in the URLs.")
@click.option("--cluster", is_flag=True, help="For a cluster, on each of whose nodes the users have to be.")
@click.option("--setuser", is_flag=True, help="Print ACL SETUSER commands for redis-cli, not a file of users.")
@click.option("--generate", is_flag=True, help="Generate passwords and print them to stderr.")
@click.argument("roles", nargs=-1, type=click.Choice([role.name for role in ROLES]))
def redis_acl(
    namespace: str, prefix: str, db: int, cluster: bool, setuser: bool, generate: bool, roles: tuple[str, ...]
) -> None:
    """Print Redis users who may do what their processes need, and nothing else.

    ROLES are gateway, worker, deployer, client and metrics; all of them unless named. A password is read from
    QSERVE_ACL_<ROLE>, or generated with --generate; else the output has a placeholder. The output is a file for the
    server's `aclfile` setting, or with --setuser commands for `redis-cli`.
    """
    if not is_name(namespace) or not is_name(f"{prefix}x"):
        raise click.UsageError("a namespace and a prefix have letters, digits, '_', '.' and '-' only, at most 63")
    keys = Keys(namespace, SHARDS if cluster else 1)
    for role in ROLES:
        if not roles or role.name in roles:
            user = f"{prefix}{role.name}"
            line = " ".join(rules(role, keys, [_password(role, user, generate)], db))
            click.echo(f"ACL SETUSER {user} reset {line}" if setuser else f"user {user} {line}")


def _password(role: Role, user: str, generate: bool) -> str:
    given = os.environ.get(f"QSERVE_ACL_{role.name.upper()}", "")
    if given:
        return hashed(given)
    if generate:
        made = secrets.token_urlsafe(24)
        note(f"{user}: {made}")
        return hashed(made)
    note(f"{user}: set QSERVE_ACL_{role.name.upper()}, use --generate, or replace PASSWORD-OF-{user} yourself")
    return f">PASSWORD-OF-{user}"
