"""Peak memory of one update against scored positions and vocabulary: the head in chunks, and all logits at once.

    python tests/benchmarks/memory_vs_vocab.py

A model of one layer, so that nothing but the head counts. Shown is what the update adds to the memory after loading.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys


def peak() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(vocabulary: int, positions: int, dense: bool) -> None:
    """One forward and backward pass."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tisdpo_cli.model.batch import collate
    from tisdpo_cli.model.logprobs import TokenScorer

    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    rows = [([1, 2], [list(range(256))]) for _ in range(positions // 256)]
    batch = collate(rows, 0, packed=False)
    # What every way needs: the gradient of the weights.
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = peak()
    if dense:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.positions]
        logps = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    else:
        logps = TokenScorer(model)(batch)
    logps.sum().backward()
    print(json.dumps(peak() - before))


def main() -> None:
    """A table of both."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--vocabularies", default="8192,32000,151936")
    options.add_argument("--positions", default="1024,4096,8192")
    options.add_argument("--dense-up-to", type=int, default=2048, help="positions up to which all logits are tried too")
    options.add_argument("--json", action="store_true")
    options.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.worker is not None:
        vocabulary, positions, dense = asked.worker.split(",")
        worker(int(vocabulary), int(positions), dense == "dense")
        return
    found = []
    for vocabulary in map(int, asked.vocabularies.split(",")):
        for positions in map(int, asked.positions.split(",")):
            for way in ("chunks", "dense"):
                if way == "dense" and positions > asked.dense_up_to:
                    continue
                command = [sys.executable, __file__, "--worker", f"{vocabulary},{positions},{way}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append({"vocabulary": vocabulary, "positions": positions, "head": way,
                              "added_mib": round(json.loads(done.stdout.splitlines()[-1]))})  # fmt: skip
                print(found[-1], file=sys.stderr)
    if asked.json:
        print(json.dumps(found))
        return
    print(f"{'vocabulary':>10s} {'positions':>10s} {'head':>8s} {'added MiB':>10s}")
    for row in found:
        print(f"{row['vocabulary']:10d} {row['positions']:10d} {row['head']:>8s} {row['added_mib']:10d}")


if __name__ == "__main__":
    main()
