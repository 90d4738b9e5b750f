"""The bridge from encoder to LLM. Shapes: B batch, T encoder positions, A audio embeddings (T / stack), D width."""

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Concatenate `stack` positions -> Linear -> ReLU -> dropout -> Linear -> LayerNorm (arXiv 2603.27981).

    The LayerNorm's gain starts at `output_scale`, the standard deviation of the LLM's own input embeddings: an LLM
    whose embeddings are small (Qwen: 0.02) or scaled up (Gemma: 1) sees audio as it sees text.
    """

    def __init__(self, encoder_width: int, llm_width: int, stack: int, hidden: int, dropout: float, output_scale: float = 1.0):
        super().__init__()
        self.stack = stack
        self.up = nn.Linear(stack * encoder_width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, llm_width)
        self.norm = nn.LayerNorm(llm_width, eps=1e-5)
        nn.init.constant_(self.norm.weight, output_scale)

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D_encoder), (B,) -> (B, A, D_llm), (B,). What lies beyond an utterance's length counts as zero."""
        inside = torch.arange(states.shape[1], device=lengths.device) < lengths[:, None]
        states = states * inside[..., None]
        states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % self.stack))
        stacked = states.reshape(states.shape[0], -1, self.stack * states.shape[2])  # (B, A, stack * D_encoder)
        hidden = self.dropout(nn.functional.relu(self.up(stacked)))
        return self.norm(self.down(hidden)), -(-lengths // self.stack)
