"""The projector from encoder states to LLM embeddings.

Shapes: B batch, T encoder positions, A audio embeddings (T / stack, rounded up), D width.
"""

import torch
from torch import Tensor, nn

from prunesearch.model.system import SpeechProjector
from prunesearch.study.model_config import ProjectorConfig


class Projector(SpeechProjector):
    """Concatenate `stack` positions -> Linear -> ReLU -> dropout -> Linear -> LayerNorm (arXiv 2603.27981).

    The LayerNorm's gain starts at `output_scale`. Give it the standard deviation of the LLM's own input embeddings: LLMs
    differ there (Qwen: 0.02, Gemma: 1), and audio should reach the LLM at the scale of its text.
    """

    entry_name = "up"

    def __init__(self, encoder_width: int, llm_width: int, stack: int, hidden: int, dropout: float, output_scale: float = 1.0):
        super().__init__()
        self.stack = stack
        self.up = nn.Linear(stack * encoder_width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, llm_width)
        self.norm = nn.LayerNorm(llm_width, eps=1e-5)
        nn.init.constant_(self.norm.weight, output_scale)

    @classmethod
    def for_models(cls, config: ProjectorConfig, encoder_width: int, llm_width: int, output_scale: float = 1.0) -> "Projector":
        """A new projector of the study's shape, between an encoder and an LLM of these widths.

        Its weights are drawn from torch's global random generator; `output_scale` is `llm.embedding_scale` for training; it
        has no effect if trained weights are loaded afterwards.
        """
        return cls(encoder_width, llm_width, config.stack, config.hidden, config.dropout, output_scale)

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D_encoder), lengths (B,) -> (B, A, D_llm), lengths (B,)."""
        stacked, audio_lengths = self.inputs(states, lengths)
        hidden = self.dropout(nn.functional.relu(self.up(stacked)))
        return self.norm(self.down(hidden)), audio_lengths

    @property
    def entry(self) -> nn.Linear:
        return self.up

    def embeddings_of(self, positions: int) -> int:
        return positions // self.stack

    def inputs(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenated positions (B, A, stack * D_encoder), lengths (B,). States beyond an utterance's length count as 0."""
        inside = torch.arange(states.shape[1], device=lengths.device) < lengths[:, None]  # (B, T)
        states = states * inside[..., None]
        states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % self.stack))
        return states.reshape(states.shape[0], -1, self.stack * states.shape[2]), -(-lengths // self.stack)
