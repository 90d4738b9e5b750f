"""Made-up records of studies, for tests of code that reads records."""

import json
from collections.abc import Sequence
from pathlib import Path

from prunesearch.speech.wer import count_errors
from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.record import (
    Parameters,
    Rung,
    RunRecord,
    SplitResult,
    UtteranceResult,
    WordErrors,
    read_records,
    write_record,
    write_utterances,
)

LAYERS, UTTERANCES = 6, 60
WHOLE = Parameters(encoder=12_000_000, projector=2_000_000, lora=0, llm=50_000_000)
FOUND = Candidate((1, 2), 4)  # in `add_study`, the candidate that beats top2+lora on dev


def parameters(candidate: Candidate) -> Parameters:
    fewer = 1_500_000 * len(candidate.removed_layers)
    return WHOLE.model_copy(update={"encoder": WHOLE.encoder - fewer, "lora": 10_000 * candidate.lora_rank})


def utterances(errors: int) -> list[UtteranceResult]:
    """Ten words each, half of them Danish and half Dutch; `errors` substitutions in each, one more in every third."""
    return [
        UtteranceResult(
            id=f"u{i}",
            reference="a",
            hypothesis="b",
            language="da" if i % 2 else "nl",
            errors=WordErrors(substitutions=errors + (i % 3 == 0), reference_words=10),
        )
        for i in range(UTTERANCES)
    ]


def wer(errors: float) -> float:
    """The WER of `utterances(errors)`, also of a mean over trainings."""
    return (errors + 1 / 3) / 10


def heard(id: str, reference: str, hypothesis: str, group: str | None = None) -> UtteranceResult:
    """One utterance, scored."""
    errors = count_errors(reference, hypothesis)
    return UtteranceResult(id=id, reference=reference, hypothesis=hypothesis, errors=errors, group=group)


def add(
    records: Path, candidate: Candidate, errors: int, name: str | None = None, state: str = "complete", test: int | None = None
) -> RunRecord:
    """A record with so many errors per utterance on dev and, if given, on test."""
    on_test = None if test is None else utterances(test)
    return add_results(records, candidate, utterances(errors), on_test, name, state)


def add_results(
    records: Path,
    candidate: Candidate,
    dev: Sequence[UtteranceResult],
    test: Sequence[UtteranceResult] | None = None,
    name: str | None = None,
    state: str = "complete",
) -> RunRecord:
    """A record of these results. A pruned one has them at its last rung, a failed one has none."""
    on_dev = SplitResult.of(dev)
    if state == "complete":
        write_utterances(records, candidate, "dev", dev)
    if test is not None:
        write_utterances(records, candidate, "test", test)
    record = RunRecord(
        study="s",
        name=name,
        encoder_layers=LAYERS,
        removed_layers=candidate.removed_layers,
        lora_rank=candidate.lora_rank,
        repeat=candidate.repeat,
        seed=candidate.repeat,
        state=state,
        steps=10,
        dev=on_dev if state == "complete" else None,
        test=None if test is None else SplitResult.of(test),
        rungs=(Rung(step=5, errors=on_dev.errors),) if state == "pruned" else (),
        parameters=parameters(candidate),
    )
    write_record(records, record)
    return record


def add_baselines(records: Path, on_test: bool = True) -> None:
    for (name, candidate), errors in zip(baselines(LAYERS, 8).items(), (2, 1, 5, 3), strict=True):
        add(records, candidate, errors, name, test=errors if on_test else None)


def add_study(records: Path, found_on_test: int | None = 1) -> None:
    """Four baselines, a candidate that beats top2+lora on dev, a dominated one, a pruned one and a failed one."""
    add_baselines(records)
    add(records, FOUND, 2, test=found_on_test)
    add(records, Candidate((0,), 4), 7)
    add(records, Candidate((0, 1), 4), 9, state="pruned")
    add(records, Candidate((0, 2), 4), 9, state="failed")


def give_to_study(records: Path, name: str) -> None:
    """Rename the study that the records belong to."""
    for record in read_records(records):
        write_record(records, record.model_copy(update={"study": name}))


def study(folder: Path, name: str = "s") -> StudyConfig:
    """A study file in the folder, with empty data."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").touch()
    data = "\n".join(f'{split} = "{split}.jsonl"' for split in ("train", "dev", "test"))
    head = f"name = {json.dumps(name)}\n[encoder]\nmodel = 'e/e'\n[llm]\nmodel = 'l/l'\n[data]\n"
    (folder / "study.toml").write_text(head + data, encoding="utf-8")
    return load_study(folder / "study.toml", data_must_exist=False)  # as the report command does
