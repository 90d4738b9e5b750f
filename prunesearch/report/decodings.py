"""The utterances that systems were decoded on, read in pairs: both systems of a pair on the same utterances of one split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from prunesearch.report.statistics import Counts, Difference, paired_bootstrap, relative_bootstrap
from prunesearch.study.candidate import Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, UtteranceResult, read_utterances

Split = Literal["test", "dev"]
SPLITS: tuple[Split, ...] = ("test", "dev")  # a difference is computed on the first one that both systems were decoded on

CACHED = 8  # decodings in memory at once: the four baselines, and the candidates that are compared with them


@dataclass(frozen=True)
class Decoding:
    """One system on one split: for each of its trainings, the results sorted by utterance id (the same ids in each)."""

    repeats: tuple[int, ...]  # of each training
    results: tuple[tuple[UtteranceResult, ...], ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(u.id for u in self.results[0])

    @property
    def reference_words(self) -> Counts:
        """(utterances,)"""
        return np.array([u.errors.reference_words for u in self.results[0]], dtype=np.int64)

    def counts(self, kind: str = "errors") -> Counts:
        """Errors of a kind, such as `insertions`, or all of them (`errors`): (trainings, utterances)."""
        return np.array([[getattr(u.errors, kind) for u in results] for results in self.results], dtype=np.int64)

    def in_language(self, language: str) -> "Decoding":
        return Decoding(self.repeats, tuple(tuple(u for u in some if u.language == language) for some in self.results))


@dataclass(frozen=True)
class DecodedPair:
    """Two systems on the same utterances of one split."""

    split: Split
    system: Decoding
    reference: Decoding

    @property
    def by_training(self) -> bool:
        """Whether both have the same repeats. Trainings of the same repeat share their seed and their batches."""
        return self.system.repeats == self.reference.repeats

    @property
    def languages(self) -> list[str]:
        return sorted({u.language for u in self.system.results[0] if u.language})

    def in_language(self, language: str | None) -> "DecodedPair":
        """The utterances of one language; all of them for None."""
        if language is None:
            return self
        return DecodedPair(self.split, self.system.in_language(language), self.reference.in_language(language))

    def difference(self) -> Difference:
        """The system's WER minus that of the reference."""
        words = self.system.reference_words
        return paired_bootstrap(self.system.counts(), self.reference.counts(), words, by_training=self.by_training)

    def relative_change(self, kind: str = "errors") -> Difference:
        """The system's errors of a kind divided by those of the reference, minus one."""
        return relative_bootstrap(self.system.counts(kind), self.reference.counts(kind), by_training=self.by_training)


class Decodings:
    """The stored decodings of a study's systems.

    trainings: each system's complete trainings, by repeat.
    records: the record of each training, to which its utterances must add up.
    """

    def __init__(
        self,
        records_folder: Path,
        trainings: Mapping[Candidate, Sequence[Candidate]],
        records: Mapping[Candidate, RunRecord],
    ):
        self._trainings = trainings
        self._read = lru_cache(maxsize=CACHED)(partial(_read_decoding, records_folder, records))

    def pair(self, system: RunRecord, reference: RunRecord, first_training: bool = False) -> DecodedPair | None:
        """Both systems on test if all their trainings were decoded there, else on dev; None if neither holds.

        `first_training`: take and require the first training of each only. Raises StudyError if the two were decoded on
        different utterances.
        """
        most = 1 if first_training else None
        ours, theirs = (tuple(self._trainings[r.candidate][:most]) for r in (system, reference))
        for split in SPLITS:
            first, second = self._read(ours, split), self._read(theirs, split)
            if first is None or second is None:
                continue
            if first.ids != second.ids or not np.array_equal(first.reference_words, second.reference_words):
                keys = f"{system.candidate.key} and {reference.candidate.key}"
                raise StudyError([f"{keys} were not decoded on the same {split} utterances: evaluate both with one study file"])
            return DecodedPair(split, first, second)
        return None


def _read_decoding(
    records_folder: Path, records: Mapping[Candidate, RunRecord], trainings: tuple[Candidate, ...], split: Split
) -> Decoding | None:
    """The trainings' results on a split; None unless all of them were decoded on the same utterances."""
    counted = {c: records[c].dev if split == "dev" else records[c].test for c in trainings}
    read = [read_utterances(records_folder, c, split, counted[c]) for c in trainings]
    results = tuple(tuple(sorted(each or [], key=lambda u: u.id)) for each in read)
    ids = {tuple(u.id for u in each) for each in results}
    return Decoding(tuple(c.repeat for c in trainings), results) if len(ids) == 1 and all(results) else None
