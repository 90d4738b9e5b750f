"""Maintenance of a study's storage: an upgrade of its tables, and a gRPC proxy in front of its database."""

import warnings
from collections.abc import Callable
from pathlib import Path

import optuna

from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.workers.storage import open_storage, upgrade_storage
from prunesearch.workers.urls import shown


def upgrade(source: str | Path, storage: str | None = None) -> str:
    """Upgrade the tables of the study's database to the installed Optuna; returns a sentence. Raises StudyError."""
    config = load_study(source, data_must_exist=False)
    url = storage or config.storage.url
    if url is None or url.startswith("journal://"):
        return "a journal file needs no upgrade"
    if url.startswith("grpc://"):
        return "a proxy needs no upgrade; if its database does, give the database's URL with --storage"
    return f"{shown(url)}: schema {upgrade_storage(url)}"


def serve(source: str | Path, storage: str | None, host: str, port: int, ready: Callable[[], None]) -> None:
    """Run Optuna's gRPC proxy in front of the study's database. Raises StudyError for a journal, which it does not serve."""
    config = load_study(source, data_must_exist=False)
    url = storage or config.storage.url
    if url is None or url.startswith(("journal://", "grpc://")):
        raise StudyError(["storage.url: a proxy serves a database, such as postgresql+psycopg://user@host/db"])
    opened = open_storage(url, config.run_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        ready()
        optuna.storages.run_grpc_proxy_server(opened, host=host, port=port)
