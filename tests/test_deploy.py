"""The deployment examples call commands that exist, with flags that they know."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.command_lines import check_whole, find_command, variables

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
IMAGE = "prunesearch:latest"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def in_words(value: Any) -> list[str]:
    """A command as YAML or a Dockerfile may write it: a list, or one string."""
    words = value if isinstance(value, list) else shlex.split(str(value))
    return [re.sub(r"\$\{(\w+):-(.*?)\}", r"\2", re.sub(r"\$\{(\w+):\?\}", r"\1", str(word))) for word in words]


def compose_services() -> dict[str, dict[str, Any]]:
    """The services that run our image, each with the keys it takes over by `extends`."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    own = {name: {**services.get(s.get("extends"), {}), **s} for name, s in services.items()}
    return {name: s for name, s in own.items() if s.get("build", {}).get("dockerfile") == "deploy/Dockerfile"}


def kubernetes_containers() -> Iterator[dict[str, Any]]:
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        pod = document["spec"].get("template", {}).get("spec", {})
        yield from (c for c in pod.get("containers", ()) if c["image"] == IMAGE)


def test_the_image_starts_the_installed_program() -> None:
    entry = [json.loads(value) for what, value in instructions() if what == "ENTRYPOINT"]
    assert entry == [["prunesearch"]]
    assert set(entry[0]) <= set(PROJECT["scripts"])
    for what, value in instructions():
        for call in re.findall(r"\bprunesearch ((?!prunesearch)[a-z].*?)(?:&&|;|$)", value) if what == "RUN" else ():
            check_whole(shlex.split(call))
        if what == "CMD":
            check_whole(json.loads(value))


def test_the_image_copies_and_installs_existing_files() -> None:
    for what, value in instructions():
        if what == "COPY":
            *sources, _ = value.split()
            assert [source for source in sources if not (ROOT / source).exists()] == []
        for extras in re.findall(r"\.\[([\w,]+)\]", value):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_compose_runs_commands_that_exist() -> None:
    services = compose_services()
    assert {"create", "worker"} <= set(services)
    for service in services.values():
        command = in_words(service["command"])
        check_whole(command)
        known = variables(find_command(command)[0])
        assert {name for name in service["environment"] if name.startswith("PRUNESEARCH")} <= known


def test_kubernetes_runs_commands_that_exist() -> None:
    containers = list(kubernetes_containers())
    assert [container["args"][0] for container in containers] == ["launch", "worker"]
    for container in containers:
        assert "command" not in container, "the image's entry point is prunesearch"
        check_whole(in_words(container["args"]))
        known = variables(find_command(container["args"])[0])
        assert {variable["name"] for variable in container["env"] if variable["name"].startswith("PRUNESEARCH")} <= known


def test_workers_have_time_to_write_a_checkpoint_before_they_are_killed() -> None:
    for service in compose_services().values():
        assert int(service["stop_grace_period"].rstrip("s")) >= 30
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        if document["kind"] == "Job":
            assert document["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 30
