"""`prunesearch storage`: commands that maintain the storage of a study."""

from typing import Annotated

import typer

from prunesearch.cli.options import StorageUrl, Study

storage_commands = typer.Typer(help="Maintain the storage of a study.", no_args_is_help=True)


@storage_commands.command()
def upgrade(study: Study, storage: StorageUrl = None) -> None:
    """Upgrade a database's tables to the schema of the installed Optuna."""
    from prunesearch.commands.storage import upgrade as upgrade_tables

    typer.echo(upgrade_tables(study, storage))


@storage_commands.command()
def proxy(
    study: Study,
    storage: StorageUrl = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 13000,
) -> None:
    """Serve the study's database to many workers through Optuna's gRPC proxy, without encryption, until Ctrl-C."""
    from prunesearch.commands.storage import serve

    serve(study, storage, host, port, lambda: typer.echo(f"workers can use --storage grpc://{host}:{port}", err=True))
