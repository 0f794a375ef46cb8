"""The registry of commands: a command is one entry here, one file of settings, and one entry point of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.env import Env
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.evaluate import Evaluate
from tisdpo_cli.settings.export import Export
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.merge import Merge
from tisdpo_cli.settings.report import Report
from tisdpo_cli.settings.run import Run
from tisdpo_cli.settings.train_pairs import Train, TrainDpo, TrainReverse
from tisdpo_cli.settings.train_sft import TrainSft
from tisdpo_cli.settings.translate import Translate

METHOD, TOOLS = "The method", "Tools"


@dataclass(frozen=True)
class CommandSpec:
    """A command.

    Attributes:
        settings: its options; the docstring is its help.
        run: the entry point, as `module:function` of `tisdpo_cli`; it takes what it needs of `settings`, `reporter` and
            `command`, the command line.
        panel: the group of commands it is listed under.
        example: a command line for its help.
        next: the command that usually follows, a template with the fields of `cli/next_command.py`.
        shows: what it prints: the path of its output, or a view of its result.
        positional: the setting that may also be given without its flag.
        takes_rest: whether everything from its first word on belongs to it, options too.
    """

    settings: type[Command]
    run: str
    panel: str
    example: str
    next: str | None = None
    shows: Literal["path", "inspection", "evaluation", "pipeline", "curves", "translation", "environment"] = "path"
    positional: str | None = None
    takes_rest: bool = False


COMMANDS: dict[str, CommandSpec] = {
    spec.settings.command: spec
    for spec in (
        CommandSpec(
            TrainDpo,
            run="engine:train_pairs",
            panel=METHOD,
            example="tisdpo train-dpo -m MODEL -d pairs.jsonl -o out/dpo --max-steps 200",
            next="tisdpo train-reverse --model {model} --dataset {dataset}{options} --output-dir out/reverse",
        ),
        CommandSpec(
            TrainReverse,
            run="engine:train_pairs",
            panel=METHOD,
            example="tisdpo train-reverse -m MODEL -d pairs.jsonl -o out/reverse --max-steps 200",
            next="tisdpo estimate --forward out/dpo --reverse {output} --dataset {dataset}{data_options} "
            "--output-dir out/scored",
        ),
        CommandSpec(
            Estimate,
            run="engine:estimate",
            panel=METHOD,
            example="tisdpo estimate --forward out/dpo --reverse out/reverse -d pairs.jsonl -o out/scored",
            next="tisdpo train --model {model} --dataset {output}{scored_options} --output-dir out/tisdpo",
        ),
        CommandSpec(
            Train,
            run="engine:train_pairs",
            panel=METHOD,
            example="tisdpo train -m MODEL -d out/scored -o out/tisdpo --transform rank_based",
            next="tisdpo inspect-weights {dataset}{data_options}{weights_options}{tokenizer}",
        ),
        CommandSpec(
            InspectWeights,
            run="engine:inspect_weights",
            panel=METHOD,
            example="tisdpo inspect-weights out/scored --index 3 --transform exp",
            shows="inspection",
            positional="scored",
        ),
        CommandSpec(
            Run,
            run="engine:run",
            panel=METHOD,
            example="tisdpo run --config examples/quickstart.yaml",
            shows="pipeline",
        ),
        CommandSpec(
            TrainSft,
            run="engine:train_sft",
            panel=TOOLS,
            example="tisdpo train-sft --init -d pairs.jsonl -o out/sft",
            next="tisdpo train-dpo --model {output} --dataset {dataset}{data_options} --output-dir out/dpo",
        ),
        CommandSpec(
            Evaluate,
            run="engine:evaluate",
            panel=TOOLS,
            example="tisdpo evaluate -m out/tisdpo --baseline out/dpo --ref-model SFT -d DATA --samples samples.jsonl",
            shows="evaluation",
        ),
        CommandSpec(
            Export,
            run="engine:export",
            panel=TOOLS,
            example="tisdpo export samples.jsonl --alpaca-eval outputs.json",
            positional="samples",
        ),
        CommandSpec(
            Report,
            run="engine:report",
            panel=TOOLS,
            example="tisdpo report out/dpo out/tisdpo -o report.html",
            shows="curves",
            positional="runs",
        ),
        CommandSpec(
            Merge,
            run="engine:merge",
            panel=TOOLS,
            example="tisdpo merge out/tisdpo -o out/merged",
            positional="model",
        ),
        CommandSpec(
            Translate,
            run="settings.translation:translate",
            panel=TOOLS,
            example="tisdpo translate -- trl dpo --model_name_or_path MODEL --dataset_name DATA --output_dir out/dpo",
            shows="translation",
            positional="words",
            takes_rest=True,
        ),
        CommandSpec(Env, run="runs.env:environment", panel=TOOLS, example="tisdpo env --json", shows="environment"),
    )
}
