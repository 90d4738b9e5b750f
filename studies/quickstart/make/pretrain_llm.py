"""Make the quickstart's language model: a byte-level BPE tokenizer, then a small Llama pretrained on phrases.

    python pretrain_llm.py ../llm --minutes 42

Large language models can repeat and repair a text that stands before a prompt; a speech-LLM leans on that. A model of a
million parameters learns it only if its reading had it: a fifth of the documents are plain phrases, the others show a
garbled phrase, a prompt, and the phrase. What stands before the prompt is spelled in pieces of random length (BPE
dropout, Provilkov et al. 2020), with letters lost, doubled and mistaken.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_corpus import phrases_of_every_split
from phrases import LANGUAGES, draw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT = "Transcribe speech to text.\n"
BATCH = 3_072  # tokens, padding included
POOL = 2_048  # documents that are sorted by length together, so that little is padding
PEAK_LR = 3e-3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*texts, PROMPT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def garbled(text: str, letters: str, rng: random.Random) -> str:
    """The text with up to a quarter of its letters lost, doubled or mistaken; most often few, as after an encoder."""
    rate = rng.uniform(0, 0.5) ** 2
    return "".join(
        c if rng.random() > rate else rng.choice(["", c + c, rng.choice(letters), rng.choice(letters), c + " "]) for c in text
    )


def main(out: Path, minutes: float) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    splits = phrases_of_every_split()
    unseen = {text for split in ("dev", "test") for _, text in splits[split]}
    tokenizer = train_tokenizer([text for _, text in splits["pretraining"]])
    tokenizer.save_pretrained(out)
    letters = "".join(sorted({c for _, text in splits["pretraining"] for c in text}))
    pieces = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    prompt = tokenizer(PROMPT, add_special_tokens=False).input_ids

    def document() -> tuple[list[int], int]:
        """Token ids, and how many of them are only to be read: what is garbled should not be learnt."""
        while (text := draw(rng.choice(LANGUAGES), rng)) in unseen:
            pass
        written = [*tokenizer(text, add_special_tokens=False).input_ids, shape.eos_token_id]
        if rng.random() < 0.2:
            return [shape.bos_token_id, *written], 1
        pieces.model.dropout = rng.choice([0.2, 0.5, 0.8, 1.0])
        read = [shape.bos_token_id, *pieces.encode(garbled(text, letters, rng)).ids, *prompt]
        return read + written, len(read)

    def batches() -> Iterator[list[tuple[list[int], int]]]:
        """Without end: documents of like length, about BATCH tokens."""
        while True:
            pool = sorted((document() for _ in range(POOL)), key=lambda d: len(d[0]))
            found: list[list[tuple[list[int], int]]] = [[]]
            for one in pool:
                if (len(found[-1]) + 1) * len(one[0]) > BATCH:
                    found.append([])
                found[-1].append(one)
            yield from rng.sample(found, len(found))

    compiled = torch.compile(model, dynamic=True)  # half as fast again, after a minute
    begin, step, running = time.time(), 0, 5.0
    for documents in batches():
        if (done := (time.time() - begin) / (60 * minutes)) >= 1:
            break
        width = max(len(ids) for ids, _ in documents)
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in documents])
        labels = torch.tensor([[-100] * read + t[read:] + [-100] * (width - len(t)) for t, read in documents])
        lr = PEAK_LR * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = compiled(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running, step = 0.98 * running + 0.02 * loss.item(), step + 1
        if step % 200 == 0:
            print(f"step {step} {done:.0%} loss {running:.3f} lr {lr:.1e}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=42)
    arguments = parser.parse_args()
    main(arguments.out, arguments.minutes)
