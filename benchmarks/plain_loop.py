"""The training loss as plain SLAM-ASR scripts compute it: logits at every position. `step.py` and `scale.py` compare with it.

Shapes: B batch, T encoder positions, W prefix (everything before the text), S text tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunesearch.model.families.slam_asr import SpeechLlm
from prunesearch.model.llm import pad_tokens
from prunesearch.model.system import Target

IGNORED = -100  # the label of a position whose prediction does not count


def plain_loss(slam: SpeechLlm, states: Tensor, lengths: Tensor, targets: Sequence[Target]) -> Tensor:
    """Mean cross-entropy per text token (nats) for encoder states (B, T, D) of these lengths (B,).

    The value is that of `SpeechLlm.loss`; the LLM computes logits for the prefix and for padding, too.
    """
    return plain_loss_and_logits(slam, states, lengths, targets)[0]


def plain_loss_and_logits(
    slam: SpeechLlm, states: Tensor, lengths: Tensor, targets: Sequence[Target]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the logits of every position (B, W + S, V), and the labels (B, W + S)."""
    texts = [target.tokens for target in targets]
    tokens = pad_tokens(texts, 0, states.device)  # (B, S)
    prefix, mask = slam.prefix(states, lengths)  # (B, W, D), (B, W)
    embedded = slam.llm.model.get_input_embeddings()(tokens).to(prefix.dtype)
    inside = pad_tokens([[1] * len(text) for text in texts], 0, states.device)
    out = slam.model(
        inputs_embeds=torch.cat([prefix, embedded], 1), attention_mask=torch.cat([mask, inside], 1), use_cache=False
    )
    labels = torch.cat([mask.new_full(mask.shape, IGNORED), pad_tokens(texts, IGNORED, states.device)], 1)  # (B, W + S)
    logits = out.logits[:, :-1].float().flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
    return loss, out.logits, labels
