"""Speak the study's corpus, and a larger one to pretrain its encoder on. Needs espeak-ng.

    python make_corpus.py study OUT        # OUT/{train,dev,test}.jsonl with Opus files beside them
    python make_corpus.py pretraining OUT  # OUT/pretraining.npz: log-mel features and texts, 15 hours

Phrases of test and dev occur in no other split; nor do their voice variants. The same command makes the same corpus,
up to the version of espeak-ng (1.51 was used).
"""

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from encoder_shape import feature_extractor
from phrases import LANGUAGES, draw_distinct
from speech import SAMPLE_RATE, another_throat, record, through_opus, write_opus

STUDY_UTTERANCES = {"test": 300, "dev": 180, "train": 780}
PRETRAINING_UTTERANCES = 24_000
STUDY_NOISE = (12.0, 30.0)  # dB
PRETRAINING_NOISE = (8.0, 35.0)  # dB
MAX_SECONDS = 7.9


def phrases_of_every_split() -> dict[str, list[tuple[str, str]]]:
    """(language, text) by split, with no phrase in two splits; languages in equal shares."""
    taken: set[str] = set()
    splits = {}
    for split, count in {**STUDY_UTTERANCES, "pretraining": PRETRAINING_UTTERANCES}.items():
        rng = random.Random(split)
        pairs = [(language, t) for language in LANGUAGES for t in draw_distinct(count // len(LANGUAGES), language, rng, taken)]
        rng.shuffle(pairs)
        splits[split] = pairs
    return splits


def speak(job: tuple[int, str, str, str]) -> tuple[np.ndarray, str, str]:
    """(seed, split, language, text) -> samples, variant, accent; said again by another voice if too long."""
    seed, split, language, text = job
    rng = random.Random(f"{split} {seed}")
    while True:
        voices, noise = (split, STUDY_NOISE) if split in STUDY_UTTERANCES else ("train", PRETRAINING_NOISE)
        samples, voice = record(text, language, voices, rng, noise)
        if split == "pretraining":
            if rng.random() < 0.5:
                samples = another_throat(samples, rng.uniform(0.87, 1.15))
            if rng.random() < 0.35:  # it takes longer than everything else
                samples = through_opus(samples)
        if len(samples) <= MAX_SECONDS * SAMPLE_RATE:
            return samples, voice.variant, voice.accent


def make_study(out: Path) -> None:
    for split, pairs in phrases_of_every_split().items():
        if split not in STUDY_UTTERANCES:
            continue
        (out / split).mkdir(parents=True, exist_ok=True)
        jobs = [(i, split, language, text) for i, (language, text) in enumerate(pairs)]
        with ProcessPoolExecutor() as pool, (out / f"{split}.jsonl").open("w") as manifest:
            for (i, _, language, text), (samples, variant, accent) in zip(
                jobs, pool.map(speak, jobs, chunksize=16), strict=True
            ):
                name = f"{split}/{i:04d}.opus"
                write_opus(out / name, samples)
                row = {"audio": name, "text": text, "language": language, "speaker": variant, "accent": accent}
                manifest.write(json.dumps(row | {"duration": round(len(samples) / SAMPLE_RATE, 3)}, ensure_ascii=False) + "\n")


def _mel(job: tuple[int, str, str, str]) -> np.ndarray:
    samples, _, _ = speak(job)
    features = feature_extractor()(samples, sampling_rate=SAMPLE_RATE, padding=False, return_tensors="np")
    return features["input_features"][0].T.astype(np.float16)  # (frames, mels)


def make_pretraining(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pairs = phrases_of_every_split()["pretraining"]
    jobs = [(i, "pretraining", language, text) for i, (language, text) in enumerate(pairs)]
    with ProcessPoolExecutor() as pool:
        mels = list(pool.map(_mel, jobs, chunksize=64))
    lengths = np.array([len(m) for m in mels])
    np.savez(out / "pretraining.npz", mels=np.concatenate(mels), lengths=lengths, texts=np.array([t for _, t in pairs]))
    print(f"{len(mels)} phrases, {lengths.sum() * 256 / SAMPLE_RATE / 3600:.1f} hours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["study", "pretraining"])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "study":
        make_study(arguments.out)
    else:
        make_pretraining(arguments.out)
