"""Servers for tests and benchmarks, started on this machine from what is installed: PostgreSQL, and Optuna's gRPC proxy."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Postgres:
    """A PostgreSQL server with a password, in a folder of its own."""

    PASSWORD = "geheim-7f3a"

    def __init__(self, listen: str = "127.0.0.1") -> None:
        self._listen = listen
        found = [Path(p).parent for p in [shutil.which("initdb")] if p]
        found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        real = [p for p in found if (p / "postgres").exists() and (p / "initdb").exists()]
        if not real:
            raise FileNotFoundError("PostgreSQL's server is not installed (apt-get install postgresql)")
        self._bin = real[0]
        self._user = "nobody" if os.getuid() == 0 else None  # PostgreSQL does not run as root
        self.folder = Path(tempfile.mkdtemp(prefix="postgres."))
        self.port = free_port()
        secret = self.folder / "password"
        secret.write_text(self.PASSWORD)
        if self._user:
            shutil.chown(self.folder, self._user)
            shutil.chown(secret, self._user)
        self._run("initdb", "-D", self.folder / "data", "-U", "study", "-A", "scram-sha-256", "--pwfile", secret, "-N")
        if listen != "127.0.0.1":
            with (self.folder / "data" / "pg_hba.conf").open("a") as file:
                file.write("host all all 0.0.0.0/0 scram-sha-256\n")
        self.start()

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            [self._bin / program, *map(str, arguments)], user=self._user, cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://study:{self.PASSWORD}@127.0.0.1:{self.port}/postgres"

    @property
    def url_without_password(self) -> str:
        return f"postgresql+psycopg://study@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-c", "fsync=off", "-c", f"listen_addresses={self._listen}", "-c", f"unix_socket_directories={self.folder}"]
        options += ["-c", "max_connections=300"]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), *options],
            user=self._user, cwd=self.folder, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        until(self._answers, "PostgreSQL's start")

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: open connections are cut. SIGQUIT: as if the machine had lost power."""
        self.process.send_signal(how)
        self.process.wait(30)

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


PROXY = """
import sys
from optuna.storages import RDBStorage, run_grpc_proxy_server
from prunesearch.workers.storage import open_storage
run_grpc_proxy_server(open_storage(sys.argv[1], None).inner, host="127.0.0.1", port=int(sys.argv[2]))
"""


class GrpcProxy:
    """Optuna's gRPC proxy in front of a database."""

    def __init__(self, database: str) -> None:
        self._database, self.port = database, free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-c", PROXY, self._database, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: _listens(self.port), "the proxy's start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
