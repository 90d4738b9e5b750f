"""Telephone prompts in English, Spanish and French, spoken by people, as manifests: recordings of one to six seconds.

    apt-get install asterisk-core-sounds-{en,es,fr}-wav          # Debian; CC BY-SA
    python studies/whisper/make_prompts.py prompts               # prompts/{train,dev,test}.jsonl

The recordings stay where the packages put them, under /usr/share (or --root); the manifests name them. No text stands in two
splits. Left out are prompts with digits or notes in brackets, single words, and whatever is shorter or longer.
"""

import argparse
import gzip
import json
import re
from pathlib import Path

import soundfile

from prunesearch.speech.splitting import SPLITS, split_manifest

VOICES = {"en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June"}
SHORTEST, LONGEST = 1.0, 5.8  # seconds


def prompts(root: Path, language: str, voice: str) -> list[dict[str, str]]:
    """The rows of one language. Its list of texts has a line `name: text` for each recording."""
    listed = root / "doc" / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
    rows = []
    with gzip.open(listed, "rt", encoding="utf-8", errors="strict") as lines:
        for line in lines:
            name, _, text = (" ".join(part.split()) for part in line.partition(":"))
            audio = root / "asterisk" / "sounds" / voice / f"{name}.wav"
            if re.search(r"[\d\[\]<>]", text) or len(text.split()) < 2 or line.startswith(";") or not audio.is_file():
                continue
            if SHORTEST <= soundfile.info(audio).duration <= LONGEST:
                rows.append({"audio": str(audio), "text": text, "language": language})
    return rows


def main(out: Path, root: Path) -> None:
    rows = [row for language, voice in VOICES.items() for row in prompts(root, language, voice)]
    out.mkdir(parents=True, exist_ok=True)
    everything = out / "all.jsonl"
    everything.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for split in SPLITS:
        (out / f"{split}.jsonl").unlink(missing_ok=True)  # of an earlier run
    done = split_manifest(everything, out)
    print(*(f"{split}: {count} utterances" for split, count in done.utterances.items()), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the manifests")
    parser.add_argument("--root", type=Path, default=Path("/usr/share"), help="where the packages' files are")
    arguments = parser.parse_args()
    main(arguments.out, arguments.root)
