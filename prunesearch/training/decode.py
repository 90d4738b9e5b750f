"""Batched generation from audio embeddings, with a KV cache, scored against the references."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from prunesearch.config import StudyConfig
from prunesearch.model.slam import SlamAsr
from prunesearch.record import UtteranceResult
from prunesearch.speech.corpus import Utterance
from prunesearch.speech.text import normalizer_for
from prunesearch.speech.wer import score
from prunesearch.training.batches import by_length
from prunesearch.training.device import autocast
from prunesearch.training.features import StateStore


class _RowLimits(StoppingCriteria):
    """Each row of a batch ends at its own number of new tokens."""

    def __init__(self, limits: Tensor):
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        rows = input_ids.shape[0] // self.limits.shape[0]  # beams
        return input_ids.shape[1] >= self.limits.repeat_interleave(rows)


def token_limit(seconds: float, config: StudyConfig) -> int:
    """How many tokens an utterance of so many seconds may have."""
    decoding = config.decoding
    return min(decoding.max_tokens, int(seconds * decoding.tokens_per_second) + decoding.extra_tokens)


@torch.inference_mode()
def transcribe(
    slam: SlamAsr,
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

    def decoded(batch: list[int]) -> list[str]:
        limits = torch.tensor([token_limit(utterances[i].seconds, config) for i in batch], device=device)
        hidden, lengths = states.batch(batch, device)
        with autocast(device, dtype):
            embeddings, mask = slam.prefix(hidden, lengths)
            written = slam.model.generate(
                inputs_embeds=embeddings.to(slam.llm.model.dtype),
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=int(limits.max()),
                    num_beams=beams or config.decoding.beams,
                    repetition_penalty=config.decoding.repetition_penalty,
                    do_sample=False,
                    eos_token_id=slam.llm.eos,
                    pad_token_id=slam.llm.pad,
                ),
                stopping_criteria=StoppingCriteriaList([_RowLimits(limits)]),
            )
        hypotheses: list[str] = slam.llm.tokenizer.batch_decode(written, skip_special_tokens=True)
        return hypotheses

    while due:
        batch = due.pop(0)
        try:
            hypotheses = decoded(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            due[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        for i, text in zip(batch, hypotheses, strict=True):
            texts[i] = normalizer_for(config.text.normalizer_of(utterances[i].language), utterances[i].language)(text)
        progress("decoding", len(texts), len(indices))
    return [score(utterances[i], texts[i]) for i in indices]
