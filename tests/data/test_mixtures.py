"""Several datasets as one: shares, order, columns of each, and what cannot be mixed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import pair_rows, read_jsonl, run_here, write_jsonl

from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.pairs import Pairs, read_split_pairs
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load, to_yaml


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """`a` with 12 rows and `b` with 5."""
    rows = pair_rows(17)
    return {name: write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:12]), ("b", rows[12:]))}


def read(
    files: dict[str, Path], shares: tuple[float, float] | None = None, for_test: bool = False, limit: int | None = None
) -> Pairs:
    parts = tuple(
        Part(name, path, Columns(), share=shares[i] if shares else None) for i, (name, path) in enumerate(files.items())
    )
    return read_split_pairs(DatasetSplit(parts, limit, for_test=for_test), "error")


def sources(pairs: Pairs) -> str:
    """The name of the file of each pair."""
    assert [pair.index for pair in pairs.pairs] == list(range(len(pairs.pairs)))
    return "".join(Path(pair.row.where.rpartition(":")[0]).stem for pair in pairs.pairs)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0.7, 0.3), (11, 5)), ((7, 3), (11, 5)), ((1, 1), (5, 5)), ((0.9, 0.1), (12, 1)), ((0.75, 0.25), (12, 4))],
)
def test_shares_give_the_largest_mixture_without_a_row_twice(
    files: dict[str, Path], shares: tuple[float, float], expected: tuple[int, int]
) -> None:
    mixed = read(files, shares)
    counted = Counter(sources(mixed))
    assert (counted["a"], counted["b"]) == expected
    places = [pair.row.where for pair in mixed.pairs]
    assert len(set(places)) == len(places)
    total = sum(expected)
    assert mixed.notices == [
        f"mixture: {expected[0]} of 12 rows of a ({expected[0] / total:.1%}), "
        f"{expected[1]} of 5 rows of b ({expected[1] / total:.1%})"
    ]
    assert [pair.row.where for pair in read(files, shares).pairs] == places
    # Evenly interleaved: in every start of the mixture, each has its share, to a row.
    for end in range(total):
        assert abs(sources(mixed)[:end].count("b") - end * expected[1] / total) <= 1


def test_without_shares_rows_follow_each_other_and_test_rows_take_turns(files: dict[str, Path]) -> None:
    assert sources(read(files)) == "a" * 12 + "b" * 5
    assert sources(read(files, limit=3)) == "aaa"
    assert sorted(sources(read(files, for_test=True))[:6]) == list("aaaabb")


def test_a_share_too_small_for_a_row_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="b has no row in a mixture with these shares"):
        read(files, (1, 0.001))


def test_messages_and_texts_cannot_be_mixed(files: dict[str, Path], tmp_path: Path) -> None:
    chat = [
        {"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": "r"},
    ]
    files["b"] = write_jsonl(tmp_path / "b.jsonl", chat)
    with pytest.raises(DataError, match="b holds messages and a texts, which cannot be mixed"):
        read(files)


def test_a_bad_row_has_the_place_in_its_file(files: dict[str, Path]) -> None:
    files["b"].write_text(files["b"].read_text() + "broken\n")
    with pytest.raises(DataError, match=r"b\.jsonl:6"):
        read(files, (1, 1))


# Settings ----------------------------------------------------------------------------------------------------------


def settings(datasets: object, **more: object):
    flags = {"dataset": datasets, "output_dir": "o", "init": True, **more}
    return load(COMMANDS["train-sft"].settings, flags).settings


def test_a_mixture_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd=1").touch()
    assert settings(["odd=1"]).dataset == "odd=1"
    given = [{"path": "a", "share": 0.7, "prompt-column": "q", "limit": 3}, "b=0.3"]
    made = settings(given)
    plain = [{"path": "a", "share": 0.7, "prompt_column": "q", "limit": 3}, {"path": "b", "share": 0.3}]
    assert yaml.safe_load(to_yaml(made))["dataset"] == plain
    assert settings(plain) == made
    # Names are compared by content, shares as they are.
    assert settings(["x=1", "y=2"]).fingerprint() == settings(["a=1", "b=2"]).fingerprint()
    assert settings(["x=1", "y=2"]).fingerprint() != settings(["a=1", "b=1"]).fingerprint()
    assert json.dumps(made.fingerprint())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a=0.5", "a share needs several datasets"),
        (["a=0.5"], "a share needs several datasets"),
        (["a=0.5", "b"], "give a share to every dataset of a mixture, or to none"),
        (["a=0", "b=1"], "dataset 1: share: Input should be greater than 0"),
        ([{"path": "a", "shar": 1}, "b"], "dataset 1: shar: Extra inputs are not permitted"),
        ([3, "b"], "dataset 1 must be a path, or a mapping with a path"),
        ([{"path": "a", "limit": 3}], "a list of one dataset: give its settings beside --dataset"),
        ([], "the list of datasets is empty"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(value: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(value)
    assert said in str(caught.value)
    assert "--dataset" in str(caught.value)


# Commands ----------------------------------------------------------------------------------------------------------


def test_a_pipeline_takes_a_mixture_with_columns_of_each(world: Path, tmp_path: Path) -> None:
    rows = pair_rows(10)
    ranked = [
        {"prompt": r["prompt"], "answers": [{"answer": r["rejected"], "rank": 2}, {"answer": r["chosen"], "rank": 1}]}
        for r in rows[:6]
    ]
    named = [{"q": r["prompt"], "chosen": r["chosen"], "r": r["rejected"]} for r in rows[6:]]
    config = {
        "model": str(world / "sft"),
        "dataset": [
            {"path": str(write_jsonl(tmp_path / "ranked.jsonl", ranked)), "share": 0.5, "data_format": "nectar"},
            {"path": str(write_jsonl(tmp_path / "named.jsonl", named)), "share": 0.5, "prompt_column": "q"},
        ],
        "output_dir": str(tmp_path / "out"),
        "method": "prompt",
        "rejected_column": "r",
        "eval_size": 2,
        "max_steps": 1,
        "batch_size": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_here("run", "--config", tmp_path / "run.yaml")
    assert done.code == 0, done.err
    scored = [read_jsonl(tmp_path / "out" / "scored" / f"{name}.jsonl") for name in ("train", "test")]
    assert [len(split) for split in scored] == [6, 2]
    texts = {(row["prompt"], row["chosen"], row["rejected"]) for split in scored for row in split}
    assert {Path(row["mixture_source"]).stem for row in scored[0]} == {"ranked", "named"}
    assert texts < {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}
    assert "4 of 6 rows of" in done.err


def test_every_command_reads_what_it_can(world: Path, tmp_path: Path) -> None:
    data, start = world / "data", world / "sft"
    both = ("-d", f"{data}=0.5", "--dataset", f"{data / 'test.jsonl'}=0.5")
    done = run_here("train-sft", "-m", start, *both, "-o", tmp_path / "o", "--max-steps", "1", "--eval-pairs", "4")
    assert done.code == 0, done.err
    assert "8 of 24 rows" in done.err
    assert f"--dataset {data}=0.5 --dataset {data / 'test.jsonl'}=0.5" in done.err.splitlines()[-1]
    done = run_here(
        "evaluate", "-m", start, "--ref-model", start, "-d", data, "-d", data / "train.jsonl", "--eval-pairs", "4",
        "--sample-prompts", "0", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["split"] == "test, train"
    done = run_here("train", "-m", start, *both, "-o", tmp_path / "p")
    assert done.code == 2
    assert "train reads one scored dataset; give the mixture to estimate" in done.error
