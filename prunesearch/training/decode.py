"""Batched generation from audio embeddings, with a KV cache, scored against the references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.corpus import Utterance
from prunesearch.speech.text import normalizer_for
from prunesearch.speech.wer import score
from prunesearch.study.config import DecodingConfig, StudyConfig
from prunesearch.study.record import UtteranceResult
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic
from prunesearch.training.states import StateStore


class _RowLimits(StoppingCriteria):
    """Each row of a batch ends at its own number of new tokens."""

    def __init__(self, limits: Tensor):
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        rows = input_ids.shape[0] // self.limits.shape[0]  # beams
        return input_ids.shape[1] >= self.limits.repeat_interleave(rows)


@dataclass(frozen=True)
class Written:
    """What the LLM made of one recording, and how many tokens it took, the end of sequence included."""

    text: str
    new_tokens: int


def token_limit(seconds: float, decoding: DecodingConfig) -> int:
    """How many tokens an utterance of so many seconds may have."""
    return min(decoding.max_tokens, int(seconds * decoding.tokens_per_second) + decoding.extra_tokens)


def generate(
    slam: SpeechLlm,
    states: Tensor,
    lengths: Tensor,
    limits: Sequence[int],
    decoding: DecodingConfig,
    dtype: torch.dtype,
    beams: int | None = None,
) -> list[Written]:
    """Encoder states (B, T, D), (B,) -> what the LLM writes, at most `limits` tokens each."""
    device = states.device
    most = torch.tensor(limits, device=device)
    with arithmetic(device, dtype):
        embeddings, mask = slam.prefix(states, lengths)
        written = slam.model.generate(
            inputs_embeds=embeddings.to(slam.llm.model.dtype),
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max(limits),
                num_beams=beams or decoding.beams,
                repetition_penalty=decoding.repetition_penalty,
                do_sample=False,
                eos_token_id=slam.llm.eos,
                pad_token_id=slam.llm.pad,
            ),
            stopping_criteria=StoppingCriteriaList([_RowLimits(most)]),
        )
    texts = slam.llm.tokenizer.batch_decode(written, skip_special_tokens=True)
    counts = [count_new_tokens(row, limit, slam.llm.eos) for row, limit in zip(written.tolist(), limits, strict=True)]
    return [Written(text, count) for text, count in zip(texts, counts, strict=True)]


def count_new_tokens(row: Sequence[int], limit: int, eos: int) -> int:
    """Of a row that ends with its end of sequence or at its limit; what stands behind that is padding."""
    return row.index(eos) + 1 if eos in row else min(limit, len(row))


@torch.inference_mode()
def transcribe(
    slam: SpeechLlm,
    states: StateStore,
    utterances: Sequence[Utterance],
    indices: Sequence[int],
    config: StudyConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
    beams: int | None = None,
) -> list[UtteranceResult]:
    """The utterances at `indices`, decoded with `beams` (default: the study's) and scored, in that order.

    A batch that does not fit in memory is halved.
    """
    texts: dict[int, str] = {}
    batches = by_length([states.length(i) for i in indices], config.decoding.batch_size)
    due = [[indices[row] for row in rows] for rows in batches]

    def decoded(batch: list[int]) -> list[Written]:
        limits = [token_limit(utterances[i].seconds, config.decoding) for i in batch]
        hidden, lengths = states.batch(batch, device)
        return generate(slam, hidden, lengths, limits, config.decoding, dtype, beams)

    while due:
        batch = due.pop(0)
        try:
            hypotheses = decoded(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            due[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        for i, written in zip(batch, hypotheses, strict=True):
            normalized = normalizer_for(config.text.normalizer_of(utterances[i].language), utterances[i].language)
            texts[i] = normalized(written.text)
        progress("decoding", len(texts), len(indices))
    return [score(utterances[i], texts[i]) for i in indices]
