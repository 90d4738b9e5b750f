"""SLAM-ASR: [bos], audio embeddings, prompt, text -> causal LM. Its input is encoder states; the encoder is not part of it.

Shapes: B batch, T encoder positions, A audio embeddings, P prompt tokens, W prefix ([bos], A and P), S text tokens, D width,
V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunesearch.model.llm import Llm, pad_tokens
from prunesearch.model.projector import Projector


@dataclass
class SpeechLlm:
    """A projector and an LLM (with or without LoRA): everything behind the encoder."""

    projector: Projector
    llm: Llm
    model: Any  # llm.model, or the same with a LoRA

    @cached_property
    def _bos_and_prompt(self) -> tuple[Tensor, Tensor]:
        """The embeddings before and after the audio: bos (0 or 1, D) and prompt (P, D)."""
        embedding = self.llm.model.get_input_embeddings()
        with torch.no_grad():
            before, prompt = (
                embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device))
                for ids in (self.llm.bos, self.llm.prompt)
            )
        return before, prompt

    def prefix(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Everything before the text: (B, T, D), lengths (B,) -> embeddings (B, W, D), mask (B, W).

        Padding is on the left, so that every prompt ends in the last column: generation continues from there, and the
        logits that training needs are the last ones.
        """
        audio, audio_lengths = self.projector(states, lengths)
        batch, device = audio.shape[0], audio.device
        before, prompt = (e.to(audio.dtype).expand(batch, -1, -1) for e in self._bos_and_prompt)
        spoken = torch.cat([before, audio], dim=1)
        spoken_lengths = audio_lengths + len(self.llm.bos)
        width = spoken.shape[1]
        source = torch.arange(width, device=device) - (width - spoken_lengths[:, None])  # (B, width): negative is padding
        shifted = spoken.gather(1, source.clamp(min=0)[..., None].expand_as(spoken))
        mask = source >= 0
        prompt_mask = mask.new_ones(batch, len(self.llm.prompt))
        return torch.cat([shifted * mask[..., None], prompt], 1), torch.cat([mask, prompt_mask], 1).long()

    def logits(self, states: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, D), lengths (B,), text (B, S) -> (B, S, V): the predictions of the text tokens only."""
        prefix, mask = self.prefix(states, lengths)
        text = self.llm.model.get_input_embeddings()(tokens[:, :-1]).to(prefix.dtype)
        mask = torch.cat([mask, mask.new_ones(text.shape[:2])], 1)  # padding on the right is never attended to: causal
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            inputs_embeds=torch.cat([prefix, text], 1),
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=tokens.shape[1],
            use_cache=False,
        )
        return out.logits

    def loss_sum(self, states: Tensor, lengths: Tensor, texts: list[list[int]]) -> Tensor:
        """Cross-entropy, summed over the batch's text tokens (nats)."""
        labels = pad_tokens(texts, -100, states.device)
        logits = self.logits(states, lengths, labels.clamp(min=0))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    def loss(self, states: Tensor, lengths: Tensor, texts: list[list[int]]) -> Tensor:
        """Cross-entropy, mean over the batch's text tokens (nats)."""
        return self.loss_sum(states, lengths, texts) / sum(map(len, texts))
