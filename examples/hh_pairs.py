"""Turn Anthropic's hh-rlhf files into preference pairs: `{"prompt", "chosen", "rejected"}`, one per line.

The original rows are two whole dialogues. Their prompt is everything up to the last assistant turn, which both share; a
row whose dialogues differ earlier has no common prompt and is left out and counted. Knows no tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

TURN = "\n\nAssistant:"


def split_dialogues(chosen: str, rejected: str) -> dict[str, str] | None:
    """Prompt and responses of two dialogues, or None if they share no prompt, or a response is blank or equal."""
    end = chosen.rfind(TURN) + len(TURN)
    prompt = chosen[:end]
    if not rejected.startswith(prompt) or rejected.rfind(TURN) + len(TURN) != end:
        return None
    responses = {"chosen": chosen[end:], "rejected": rejected[end:]}
    if responses["chosen"] == responses["rejected"] or not all(text.strip() for text in responses.values()):
        return None
    return {"prompt": prompt, **responses}


def read(path: Path) -> Iterator[dict[str, str] | None]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            yield split_dialogues(row["chosen"], row["rejected"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="train.jsonl.gz")
    parser.add_argument("test", type=Path, help="test.jsonl.gz")
    parser.add_argument("--output-dir", type=Path, default=Path("hh"))
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = list(read(getattr(arguments, split)))
        kept = [row for row in rows if row is not None]
        path = arguments.output_dir / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        print(f"{path}: {len(kept)} pairs, {len(rows) - len(kept)} rows left out")


if __name__ == "__main__":
    main()
