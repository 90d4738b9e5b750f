"""Batched generation from encoder states, with a KV cache, scored against the references."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunesearch.model.system import GenerationLimits, Reader
from prunesearch.speech.corpus import Utterance
from prunesearch.speech.text import normalizer_for
from prunesearch.speech.wer import score
from prunesearch.study.config import DecodingConfig, TextConfig
from prunesearch.study.record import UtteranceResult
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic
from prunesearch.training.states import StateStore


@dataclass(frozen=True)
class Hypothesis:
    """The LLM's text for one recording, and its number of tokens, end of sequence included.

    reached_limit: the text ends at its token limit, and not with an end of sequence.
    """

    text: str
    new_tokens: int
    reached_limit: bool


def token_limit(seconds: float, decoding: DecodingConfig) -> int:
    """The most tokens that the text of so many seconds may have."""
    limit = int(seconds * decoding.tokens_per_second) + decoding.extra_tokens
    return limit if decoding.max_tokens is None else min(decoding.max_tokens, limit)


@dataclass(frozen=True)
class Decoder:
    """Decodes encoder states with one system. `beams`: None takes the number in `decoding`."""

    reader: Reader
    decoding: DecodingConfig
    device: torch.device
    dtype: torch.dtype
    beams: int | None = None

    def limit(self, seconds: float) -> int:
        """The most tokens that are written for a recording of so many seconds."""
        return token_limit(seconds, self.decoding) + self.reader.format_tokens

    @torch.inference_mode()
    def generate(
        self, states: Tensor, lengths: Tensor, limits: Sequence[int], languages: Sequence[str | None]
    ) -> list[Hypothesis]:
        """Encoder states (B, T, D), lengths (B,) -> a hypothesis for each, of at most `limits` tokens.

        `languages`: of the recordings, for systems that take one; None where it is not known.
        """
        reader, decoding = self.reader, self.decoding
        generation = GenerationLimits(limits, self.beams or decoding.beams, decoding.repetition_penalty)
        with arithmetic(self.device, self.dtype):
            written = reader.generate(states, lengths, languages, generation)
        return [
            Hypothesis(text, count_new_tokens(row, limit, reader.ends), reached_limit(row, limit, reader.ends))
            for text, row, limit in zip(reader.texts(written), written, limits, strict=True)
        ]

    def decode(
        self,
        states: StateStore,
        utterances: Sequence[Utterance],
        indices: Sequence[int],
        progress: Callable[[str, int, int], None] = lambda what, done, of: None,
    ) -> dict[int, Hypothesis]:
        """A hypothesis for each of the utterances at `indices`. A batch that does not fit in memory is halved.

        Raises torch.OutOfMemoryError when one utterance alone does not fit, and what `progress` raises.
        """
        found: dict[int, Hypothesis] = {}
        batches = by_length([states.length(i) for i in indices], self.decoding.batch_size)
        waiting = [[indices[row] for row in rows] for rows in batches]
        while waiting:
            batch = waiting.pop(0)
            limits = [self.limit(utterances[i].seconds) for i in batch]
            try:
                hypotheses = self.generate(*states.batch(batch, self.device), limits, [utterances[i].language for i in batch])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                waiting[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            found |= zip(batch, hypotheses, strict=True)
            progress("decoding", len(found), len(indices))
        return found


def count_new_tokens(row: Sequence[int], limit: int, ends: Collection[int]) -> int:
    """The tokens of a row that ends with an end of sequence or at its limit; padding after that does not count."""
    row = row[:limit]  # an LLM may pad with its end of sequence
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))


def reached_limit(row: Sequence[int], limit: int, ends: Collection[int]) -> bool:
    """Whether a row has as many tokens as its limit allows, and none of them is an end of sequence."""
    return len(row) >= limit and not any(token in ends for token in row[:limit])


def scored(
    hypotheses: dict[int, Hypothesis], utterances: Sequence[Utterance], indices: Sequence[int], text: TextConfig
) -> list[UtteranceResult]:
    """The normalised hypotheses beside their references, in the order of `indices`."""
    results = []
    for i in indices:
        language = utterances[i].language
        normalize = normalizer_for(text.normalizer_of(language), language)
        result = score(utterances[i], normalize(hypotheses[i].text), text)
        results.append(result.model_copy(update={"reached_limit": hypotheses[i].reached_limit}))
    return results
