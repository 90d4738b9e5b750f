"""Pretrain the quickstart's Whisper encoder on synthetic speech.

    python pretrain_encoder.py BIG/pretraining.npz ../llm ../encoder --minutes 120


As Whisper is trained: encoder and decoder, cross-entropy on the text. A CTC loss on the encoder's output is added
(hybrid CTC/attention, Watanabe et al. 2017), since it makes the alignment appear in minutes instead of hours. The
decoder and the CTC head stay behind, beside the corpus; no layer is dropped, weighted or treated differently.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from encoder_shape import config, feature_extractor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from prunesearch.model.encoder import WhisperLayers, load_encoder

FRAMES_A_BATCH = 7_000  # mel frames of 16 ms: about 50 phrases
CTC_SHARE = 0.4


def masked(features: Tensor, rng: np.random.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019): two bands of up to 12 mels and two stretches of up to 12 frames. (B, M, F)."""
    for row in features:
        for _ in range(2):
            width, start = rng.integers(0, 13), rng.integers(0, 68)
            row[start : start + width] = 0
            width, start = rng.integers(0, 13), rng.integers(0, max(1, row.shape[1] - 12))
            row[:, start : start + width] = 0
    return features


def main(data: Path, llm: Path, out: Path, minutes: float, go_on: bool, peak: float) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    corpus = np.load(data)
    mels, lengths, texts = corpus["mels"], corpus["lengths"], [str(t) for t in corpus["texts"]]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    letters = ["", *sorted(set("".join(texts)))]  # "" is the CTC blank
    letter_of = {c: i for i, c in enumerate(letters)}

    shape = config(len(tokenizer))
    model = WhisperForConditionalGeneration(shape)
    ctc = nn.Linear(shape.d_model, len(letters))
    left_behind = data.with_name("decoder.pt")
    if go_on:
        model.model.encoder.load_state_dict(load_encoder(out).state_dict())
        if left_behind.exists():
            states = torch.load(left_behind, weights_only=True)
            model.model.decoder.load_state_dict(states["decoder"])
            ctc.load_state_dict(states["ctc"])
    parameters = [p for p in (*model.parameters(), *ctc.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    held_out = set(range(300))  # a look at progress; the study's own dev and test speakers are not here

    def batches() -> list[list[int]]:
        order = sorted((i for i in range(len(texts)) if i not in held_out), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
        found: list[list[int]] = [[]]
        for i in order:
            if (len(found[-1]) + 1) * lengths[i] > FRAMES_A_BATCH:
                found.append([])
            found[-1].append(i)
        return [found[j] for j in rng.permutation(len(found))]

    def losses(batch: list[int], augment: bool) -> tuple[Tensor, Tensor]:
        frames = torch.tensor(lengths[batch])
        features = torch.zeros(len(batch), shape.num_mel_bins, int(frames.max()))
        for row, i in zip(features, batch, strict=True):
            row[:, : lengths[i]] = torch.from_numpy(mels[starts[i] : ends[i]].T.astype(np.float32))
        if augment:
            features = masked(features, rng)
        encoder = model.model.encoder
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the CPU's flash backward is slow
            states, positions = WhisperLayers(encoder, None).encode(features, frames)
            inside = torch.arange(states.shape[1]) < positions[:, None]
            width = max(len(tokens[i]) for i in batch) + 1
            labels = torch.full((len(batch), width), -100)
            for row, i in zip(labels, batch, strict=True):
                row[: len(tokens[i]) + 1] = torch.tensor([*tokens[i], shape.eos_token_id])
            inputs = torch.cat([torch.full((len(batch), 1), shape.decoder_start_token_id), labels[:, :-1].clamp(min=0)], 1)
            decoded = model.model.decoder(input_ids=inputs, encoder_hidden_states=states * inside[..., None], use_cache=False)
            logits = model.proj_out(decoded.last_hidden_state)
            letter_logits = ctc(states)
        attention = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=0.1 * augment)
        targets = torch.cat([torch.tensor([letter_of[c] for c in texts[i]]) for i in batch])
        target_lengths = torch.tensor([len(texts[i]) for i in batch])
        scores = letter_logits.float().log_softmax(-1).transpose(0, 1)
        aligned = nn.functional.ctc_loss(scores, targets, positions, target_lengths, zero_infinity=True)
        return attention, aligned

    begin, step, epoch = time.time(), 0, 0
    running = np.zeros(2)
    while (done := (time.time() - begin) / (60 * minutes)) < 1:
        epoch += 1
        for batch in batches():
            done = (time.time() - begin) / (60 * minutes)
            if done >= 1:
                break
            lr = peak * min(1, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            attention, aligned = losses(batch, augment=True)
            ((1 - CTC_SHARE) * attention + CTC_SHARE * aligned).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running = 0.98 * running + 0.02 * np.array([attention.item(), aligned.item()])
            step += 1
            if step % 100 == 0:
                print(
                    f"epoch {epoch} step {step} {done:.0%} attention {running[0]:.3f} ctc {running[1]:.3f} lr {lr:.1e}",
                    flush=True,
                )
        model.eval()
        with torch.no_grad():
            attention, aligned = losses(sorted(held_out), augment=False)
        model.train()
        print(f"== epoch {epoch}: held out: attention {attention:.3f} ctc {aligned:.3f}", flush=True)
        save(model, out)
        torch.save({"decoder": model.model.decoder.state_dict(), "ctc": ctc.state_dict()}, left_behind)


def save(model: WhisperForConditionalGeneration, out: Path) -> None:
    copy.deepcopy(model.model.encoder).to(torch.float16).save_pretrained(out)
    feature_extractor().save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("llm", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=47)
    parser.add_argument("--go-on", action="store_true", help="from the encoder that OUT holds, and its decoder if it is there")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    arguments = parser.parse_args()
    main(**vars(arguments))
