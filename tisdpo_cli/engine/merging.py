"""merge: an adapter and its base model as one whole model, checked by its log-probs."""

from __future__ import annotations

from pathlib import Path

import torch

from tisdpo_cli.engine.dry_run import DryRun, frozen_model, program_memory, rounded
from tisdpo_cli.engine.model_card import CARD_FILE, OUTPUT, CardFacts, card_metadata, code, model_card
from tisdpo_cli.engine.training.planning import Prediction
from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.files import reporting_write_errors, write_text
from tisdpo_cli.model.adapters import adapters_of, refuse_unfaithful_merge
from tisdpo_cli.model.content_hashes import hash_model
from tisdpo_cli.model.directory import (
    ADAPTER_CONFIG,
    base_of,
    is_adapter,
    is_quantized_adapter,
    locate_model,
    read_json,
    weight_files,
)
from tisdpo_cli.model.layout import probe_logps
from tisdpo_cli.model.loading import load_model, save_model
from tisdpo_cli.model.quantization import dequantized, is_quantized
from tisdpo_cli.model.tokenizer import load_tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.machine import device_memory, free_disk, read_rate
from tisdpo_cli.runs.outputs import Output, apply_umask
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import OutputRequest, StageResult, claim_output, finished_result
from tisdpo_cli.settings.command_lines import command_line, shown_path
from tisdpo_cli.settings.merge import Merge
from tisdpo_cli.settings.sources import to_yaml

# In nats per token, in float32: a pretrained model of 135 M parameters rounds by up to 1e-4 on random tokens, while a
# merge that goes wrong is off by tenths.
_TOLERANCE = 2e-3


def merge(settings: Merge, reporter: Reporter) -> StageResult:
    """Run merge.

    Raises:
        TisdpoError: anything the user can fix; see the subclasses in `errors`.
    """
    path = locate_model(settings.model, "--model", settings.trust_remote_code)
    if not is_adapter(path):
        raise UsageError("is a whole model, not an adapter", where=settings.model)
    quantized = is_quantized_adapter(path)
    if quantized and not settings.dequantize:
        raise UsageError(
            "this adapter was trained on its base model in 4 bits, which a merged model does not have",
            where=settings.model,
            fix="add --dequantize to merge it into the expanded weights, which gives the same log-probs",
        )
    if settings.dequantize and not quantized:
        raise UsageError("the base model of this adapter is not quantized", where="--dequantize")
    runtime = Runtime(reporter)
    if runtime.world > 1:
        raise UsageError("merge runs in a single process", fix="start it without a launcher")
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    if settings.dry_run:
        prediction = _predict(runtime, path, settings.trust_remote_code, dtype, Path(settings.output_dir))
        reporter.note("dry run: nothing was merged")
        return StageResult(Path(settings.output_dir), {}, False, DryRun(to_yaml(settings), {}, None, prediction))
    request = OutputRequest(
        path=Path(settings.output_dir),
        command=settings.command,
        fingerprint=settings.fingerprint(),
        inputs=[path, base_of(path)],
        content_hashes=lambda: {"content of model": hash_model(path)},
        overwrite=settings.overwrite,
        restart=False,
    )
    with claim_output(runtime, request) as output:
        if output.state == "finished":
            return finished_result(runtime, output)
        facts = _card_facts(settings, path)
        _merge(path, settings.trust_remote_code, dtype, output, to_yaml(settings), facts, reporter)
        return StageResult(output.path, output.record(), fresh=True)


def _card_facts(settings: Merge, adapter: Path) -> CardFacts:
    """What the card of the merged model says; what the adapter's card says of the data holds for it too."""
    base, of_adapter = str(read_json(adapter / ADAPTER_CONFIG, "")["base_model_name_or_path"]), card_metadata(adapter)
    tags = [tag for tag in of_adapter.get("tags") or () if isinstance(tag, str) and tag not in ("tisdpo", "lora")]
    datasets = [name for name in of_adapter.get("datasets") or () if isinstance(name, str)]
    return CardFacts(
        title="Merged adapter",
        summary="An adapter merged into its base model: a whole model with the same log-probs.",
        command_line=command_line(settings, OUTPUT),
        base=base,
        base_name=shown_path(base),
        datasets=tuple(datasets),
        tags=tuple(tags),
        rows={
            "base model": code(shown_path(base)),
            "adapter": code(shown_path(settings.model)),
            "precision of the weights": settings.dtype,
        },
    )


# Below this line there are no settings ----------------------------------------------------------------------------


def _predict(runtime: Runtime, path: Path, trust_remote_code: bool, dtype: torch.dtype, output: Path) -> Prediction:
    """What merging needs, from shapes alone. Its time is that of files: read to hash and to load, and written."""
    model = frozen_model(path, trust_remote_code)
    expanded = 4 * model.shape.frozen
    memory = {
        "program": program_memory(runtime),
        "weights": model.base_bytes + model.own_bytes,
        "weight file": model.file,
        # Beside the base model in 4 bits.
        "expanded weights": expanded if model.base_bytes < expanded else 0,
    }
    written = dtype.itemsize * model.shape.frozen
    rate = read_rate(weight_files(base_of(path)))
    return Prediction(
        processes=1,
        device="cpu",
        sharded=False,
        memory=rounded(memory),
        when="merging",
        device_memory=device_memory(torch.device("cpu")),
        disk={"model": written},
        free_disk=free_disk(output),
        flops={},
        seconds={"reading": 2 * model.file / rate, "writing": written / rate},
        change=None,
    )


def _merge(
    path: Path,
    trust_remote_code: bool,
    dtype: torch.dtype,
    output: Output,
    config: str,
    facts: CardFacts,
    reporter: Reporter,
) -> None:
    tokenizer = load_tokenizer(path, trust_remote_code)
    model = load_model(path, trust_remote_code, trained=False)
    refuse_unfaithful_merge(model, str(path))
    expected = probe_logps(model)
    if is_quantized(model):
        # An adapter on layers in 4 bits would be merged by quantizing again.
        base = dequantized(load_model(base_of(path), trust_remote_code, quantized=True))
        model = load_model(path, trust_remote_code, onto=base, trained=False)
    adapters = adapters_of(model)
    assert adapters is not None
    model = adapters.merge()
    worst = float((probe_logps(model) - expected).abs().max())
    if not worst <= _TOLERANCE:
        raise ModelError(f"merged, its log-probs would differ by {worst:.1e} nats", where=str(path), fix="keep it")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        rounded = float((probe_logps(model) - expected).abs().max())
    reporter.note(f"log-probs differ by at most {rounded:.1e} nats from those of the adapter")
    output.start(config)
    record = {"adapter": str(path), "base": str(base_of(path)), "largest_difference": rounded}
    with reporting_write_errors(output.path):
        staged = output.staging()
        save_model(model, tokenizer, staged)
        write_text(staged / CARD_FILE, model_card(facts, output.made_from, record, base=None))
        apply_umask(list(staged.iterdir()))
        files = output.publish(staged)
    output.finish(record, files)
