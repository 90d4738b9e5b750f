"""What a study is locked to, and what in its storage or its folder is refused."""

from pathlib import Path

import pytest

from prunesearch.commands.launch import launch
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.workers.optuna_study import lock_provenance
from tests.conftest import write_study
from tests.test_launch import cli
from tests.workers_helpers import opened


def test_other_data_are_refused_unless_changes_are_allowed(config: StudyConfig) -> None:
    study = opened(config, None)
    lock_provenance(study, "data", {"dev": {"utterances": 4, "digest": "a"}})
    lock_provenance(study, "data", {"dev": {"utterances": 4, "digest": "a"}})
    with pytest.raises(StudyError) as caught:
        lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}})
    assert caught.value.lines[:2] == [
        "data.dev.digest: the study has 'a', this worker 'b'",
        "data.dev.utterances: the study has 4, this worker 5",
    ]
    lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}}, allow_changes=True)
    lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}})


def test_a_worker_with_other_texts_may_not_join(toy: Path, tmp_path: Path) -> None:
    manifest = (toy / "dev.jsonl").read_text().replace('"dev/', f'"{toy}/dev/')
    (tmp_path / "dev.jsonl").write_text(manifest)
    file = write_study(tmp_path / "s", toy, data={"dev": str(tmp_path / "dev.jsonl")})
    launch(file, trials=1)
    (tmp_path / "dev.jsonl").write_text(manifest.replace('"text": "low', '"text": "mid', 1))
    told = cli("worker", file)
    assert told.returncode == 2
    assert [line.split(":")[0] for line in told.stderr.splitlines()][:1] == ["data.dev.digest"]
    assert cli("worker", file, "--allow-changes").returncode == 0


def test_a_worker_cannot_join_a_study_that_was_not_launched(toy: Path, tmp_path: Path) -> None:
    done = cli("worker", write_study(tmp_path / "s", toy))
    assert done.returncode == 2
    assert "`prunesearch launch" in done.stderr
