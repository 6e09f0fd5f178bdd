"""Operator commands for the stores: `python -m storage --help`."""

from __future__ import annotations

from pathlib import Path

import alembic.command
import alembic.config
import click
import sqlalchemy as sa

import config
from errors import TidegateError
from storage.database import Database
from storage.keys import Keys
from storage.records import Records

_MIGRATION_LOCK = 7_311_982


def alembic_config() -> alembic.config.Config:
    """Alembic, pointed at this package's migrations."""
    found = alembic.config.Config()
    found.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return found


def upgrade(url: str) -> None:
    """Bring the schema up to date; safe to run from several places at once."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        made = alembic_config()
        made.attributes["connection"] = connection
        alembic.command.upgrade(made, "head")


@click.group(help="Migrations, tenants and API keys. Settings come from TIDEGATE_* variables.")
def main() -> None:
    pass


@main.command(help="Bring the database schema up to date.")
def migrate() -> None:
    settings = config.load()
    upgrade(settings.database_url)
    Records(Database(settings.database_url, pool_size=1)).ensure_partitions()
    click.echo("the schema is up to date")


@main.command("create-key", help="Give a tenant an API key; it is shown once.")
@click.option("--tenant", required=True, help="Name of the tenant; made where there is none.")
@click.option(
    "--key",
    envvar="TIDEGATE_API_KEY",
    help="Use this key instead of a new one. Better by TIDEGATE_API_KEY: arguments are public.",
)
@click.option("--weight", default=1, show_default=True, help="Share of a busy group's time.")
def create_key(tenant: str, key: str | None, weight: int) -> None:
    settings = config.load()
    keys = Keys(Database(settings.database_url, pool_size=1), settings.secret)
    try:
        made = keys.create(tenant, key, weight=weight)
    except TidegateError as error:
        raise click.ClickException(error.message) from error
    if key is None:
        click.echo(made)


@main.command("revoke-key", help="End an API key by its public prefix (tg_live_XXXXXXXX).")
@click.argument("prefix")
def revoke_key(prefix: str) -> None:
    settings = config.load()
    if not Keys(Database(settings.database_url, pool_size=1), settings.secret).revoke(prefix):
        raise click.ClickException(f"no live key has the prefix {prefix}")


if __name__ == "__main__":
    main()
