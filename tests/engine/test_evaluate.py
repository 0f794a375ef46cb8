"""evaluate: its metrics against enumeration over a toy vocabulary, against itself, and through the program."""

from __future__ import annotations

import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, run_here, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tisdpo_cli.cli.evaluation_view import _PAIR_ROWS, _SAMPLE_ROWS
from tisdpo_cli.engine.evaluation.evaluate import evaluate
from tisdpo_cli.engine.evaluation.results import Evaluation
from tisdpo_cli.engine.evaluation.sampling import Sampling, left_padded, pick, sample_all, uniform_draws
from tisdpo_cli.engine.evaluation.statistics import (
    bootstrap,
    interpolate,
    mean,
    perplexity,
    ratio,
    repetition,
    sign_test,
    win_rate,
)
from tisdpo_cli.errors import DataError, ModelError, TisdpoError, UsageError
from tisdpo_cli.model.loading import load_model, load_reward_model
from tisdpo_cli.model.tokenizer import load_tokenizer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

SMALL = {"sample_prompts": "6", "max_new_tokens": "12", "eval_pairs": "8"}


def evaluated(world: Path, model: str | Path, **more: object) -> Evaluation:
    given = {"model": str(model), "ref_model": str(world / "sft"), "dataset": str(world / "data"), **SMALL, **more}
    return evaluate(load(COMMANDS["evaluate"].settings, {k: str(v) for k, v in given.items()}).settings, Silent())


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward function of the user: longer responses are better."""
    folder = tmp_path_factory.mktemp("scorer")
    (folder / "taste.py").write_text(
        "def length(prompts, responses):\n    assert len(prompts) == len(responses)\n"
        "    return [len(r) for r in responses]\n"
        "def short(prompts, responses):\n    return [1.0]\n"
        "def nan(prompts, responses):\n    return [float('nan')] * len(responses)\n"
        "def words(prompts, responses):\n    return ['good'] * len(responses)\n"
        "def broken(prompts, responses):\n    raise ValueError('no taste\\nat all')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "taste"


# ---------------------------------------------------------------- a toy vocabulary, enumerated

EOS, LIMIT = 0, 4


@pytest.fixture(scope="module")
def toys() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Two clearly different models over five tokens."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, initializer_range=0.5, eos_token_id=EOS, bos_token_id=None,
        )  # fmt: skip
        models.append(LlamaForCausalLM(config).eval())
    return models[0], models[1]


def responses() -> list[list[int]]:
    """Every response of at most LIMIT tokens, its EOS included where it has one."""
    ended = [[*body, EOS] for n in range(LIMIT) for body in product(range(1, 5), repeat=n)]
    return ended + [list(body) for body in product(range(1, 5), repeat=LIMIT)]


@torch.inference_mode()
def logp(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits.double().log_softmax(-1)
    return sum(float(logits[0, len(prompt) - 1 + t, token]) for t, token in enumerate(response))


def test_samples_have_the_probabilities_of_the_model(toys) -> None:
    """Shares of whole responses against their probabilities, within five standard errors each."""
    model, prompt, n = toys[0], [3, 1, 4], 4000
    exact = {tuple(r): math.exp(logp(model, prompt, r)) for r in responses()}
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    draws = uniform_draws(7, [(0, k) for k in range(n)], LIMIT)
    samples = sample_all(model, [prompt] * n, draws, Sampling({EOS}, EOS, LIMIT), 512)
    found = [tuple(s.scored) for s in samples]
    assert all(s.ended == (s.scored[-1] == EOS) for s in samples)
    for response, p in exact.items():
        assert abs(found.count(response) / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 2 / n


def test_the_kl_of_responses_agrees_with_enumeration(toys) -> None:
    from tisdpo_cli.model.batch import collate
    from tisdpo_cli.model.logprobs import TokenScorer, compare

    policy, reference = toys
    prompt, n = [2, 2], 2000
    ours = {tuple(r): logp(policy, prompt, r) for r in responses()}
    exact = sum(math.exp(p) * (p - logp(reference, prompt, list(r))) for r, p in ours.items())
    tokens = sum(math.exp(p) * len(r) for r, p in ours.items())
    samples = sample_all(
        policy, [prompt] * n, uniform_draws(0, [(0, k) for k in range(n)], LIMIT), Sampling({EOS}, EOS, LIMIT), n
    )
    batch = collate([(prompt, [s.scored]) for s in samples], EOS, packed=False)
    kl = compare(TokenScorer(policy), TokenScorer(reference), batch, "policy||reference").kl
    sums = torch.zeros(n).index_add(0, batch.response_ids, kl.detach()).tolist()
    per_response, per_token = mean(sums), ratio(sums, [len(s.scored) for s in samples])
    assert exact > 0.3
    assert abs(per_response.value - exact) <= 4 * per_response.standard_error
    assert abs(per_token.value - exact / tokens) <= 4 * per_token.standard_error
    assert per_response.standard_error < exact / 20


@pytest.mark.parametrize("pad", [EOS, 4], ids=["pad is EOS", "pad is a word"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_padding_and_batches_change_nothing(toys, pad: int, temperature: float) -> None:
    prompts = [[1], [2, 3, EOS, 4], [4, 4], [EOS, EOS, 1, 2, 3, 1]] * 3
    draws = uniform_draws(3, [(i, 0) for i in range(len(prompts))], 6)
    sampled = [sample_all(toys[0], prompts, draws, Sampling({EOS}, pad, 6, temperature), size) for size in (1, 3, 12)]
    assert sampled[0] == sampled[1] == sampled[2]
    assert len({tuple(s.ids) for s in sampled[0]}) > 1


def test_a_seed_determines_the_random_numbers() -> None:
    keys = [(0, 0), (0, 1), (5, 0)]
    first = uniform_draws(1, keys, 8)
    assert torch.equal(first, uniform_draws(1, keys, 8))
    assert torch.equal(first[2], uniform_draws(1, [(5, 0)], 8)[0])
    assert not torch.equal(first, uniform_draws(2, keys, 8))
    assert len(first.unique()) == first.numel()


def test_a_token_without_probability_is_never_picked() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).repeat(3, 1)
    assert pick(logits, torch.tensor([0.0, 0.49, 0.5], dtype=torch.float64), 1.0).tolist() == [0, 0, 2]


def test_left_padding_is_masked_by_length() -> None:
    ids, mask = left_padded([[7, 7, 1], [7]], 7)
    assert ids.tolist() == [[7, 7, 1], [7, 7, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---------------------------------------------------------------- statistics, by hand


def test_the_sign_test_is_the_binomial_one() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 3) == 1.0
    assert sign_test(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    assert sign_test(7, 1) == sign_test(1, 7)
    assert 0 < sign_test(400, 1600) < 1e-100


def test_ties_count_half_in_a_win_rate() -> None:
    won = win_rate([1, 2, 3, 4], [1, 3, 2, 4])
    assert (won.wins, won.ties, won.losses, won.win_rate, won.p_value) == (1, 2, 1, 0.5, 1.0)


def test_an_error_of_one_sample_is_unknown() -> None:
    assert mean([2.0]).standard_error is None
    assert ratio([], []).value == 0.0


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    covered = 0
    for row in draws:
        interval = bootstrap([[value] for value in row.tolist()], 0)
        assert interval.low < interval.mean < interval.high
        covered += interval.low <= 0 <= interval.high
    assert 51 <= covered <= 60
    one = bootstrap([[1.0, 3.0]] * 5, 0)
    assert (one.mean, one.low, one.high) == (2.0, 2.0, 2.0)


def test_small_statistics() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1] * 10) == pytest.approx(6 / 7)
    assert perplexity(-2 * math.log(8), 2) == pytest.approx(8)
    assert perplexity(-1e6, 1) > 1e300
    assert interpolate([(2.0, 1.0), (0.0, 0.0), (4.0, 5.0)], 3.0) == 3.0
    assert interpolate([(0.0, 0.0), (1.0, 1.0)], 2.0) is None


# ---------------------------------------------------------------- the engine


def test_a_model_against_itself_is_even_and_has_no_kl(contrast: Path, scorer: str) -> None:
    sft = contrast / "sft"
    found = evaluated(contrast, sft, baseline=sft, scorer=f"{scorer}:length", samples_per_prompt=3)
    for policy in found.policies[:2]:
        assert policy.pairs.margin.value == policy.pairs.kl_chosen == policy.pairs.kl_rejected == 0.0
        assert policy.pairs.ties == 1.0
        assert policy.samples.kl_per_token.value == policy.samples.kl_per_response.value == 0.0
        assert policy.samples.samples == 18
        assert policy.pairs.perplexity_chosen == found.reference_perplexity["chosen"]
    won = found.policies[0].against_baseline
    assert (won.win_rate, won.wins, won.ties, won.losses, won.p_value) == (0.5, 0, 18, 0, 1.0)
    assert [p.role for p in found.policies] == ["model", "baseline", "reference"]


def test_held_out_figures_are_those_of_the_training(contrast: Path) -> None:
    last = read_jsonl(contrast / "dpo" / "metrics.jsonl")[-1]
    of = evaluated(contrast, contrast / "dpo", sample_prompts=0).policies[0]
    assert of.samples is None
    assert of.pairs.margin.value == pytest.approx(last["eval/rewards/margins"], abs=1e-5)
    assert of.pairs.accuracy == pytest.approx(last["eval/rewards/accuracies"])
    assert of.pairs.reward_chosen == pytest.approx(last["eval/rewards/chosen"], abs=1e-5)
    assert of.pairs.kl_chosen > 0


def test_the_batch_size_changes_nothing(contrast: Path, scorer: str) -> None:
    evaluations = [evaluated(contrast, contrast / "dpo", scorer=f"{scorer}:length", batch_size=size) for size in (1, 5)]
    one, five = (found.policies[0] for found in evaluations)
    assert one.samples.reward == five.samples.reward
    assert one.samples.length == five.samples.length
    assert one.samples.kl_per_token.value == pytest.approx(five.samples.kl_per_token.value, rel=1e-4)
    assert one.pairs.margin.value == pytest.approx(five.pairs.margin.value, abs=1e-5)
    assert one.pairs.perplexity_chosen == pytest.approx(five.pairs.perplexity_chosen, rel=1e-5)


def test_several_checkpoints_are_compared_at_the_kl_of_the_baseline(contrast: Path, scorer: str) -> None:
    names = ",".join(str(contrast / name) for name in ("dpo", "reverse"))
    found = evaluated(contrast, names, baseline=contrast / "sft", scorer=f"{scorer}:length")
    assert [p.role for p in found.policies] == ["model", "model", "baseline", "reference"]
    reference = found.policies[-1].samples
    assert reference.kl_per_response.value == 0.0
    assert found.reward_at_baseline_kl == pytest.approx(reference.reward.mean)  # a baseline of KL 0
    assert evaluated(contrast, contrast / "dpo", baseline=contrast / "sft").reward_at_baseline_kl is None


def test_a_temperature_gives_no_kl_of_the_policy(contrast: Path) -> None:
    of = evaluated(contrast, contrast / "dpo", temperature=0).policies[0].samples
    assert of.kl_per_token is None
    assert of.kl_per_response is None
    assert of.samples == 6


def test_the_prompts_are_distinct(contrast: Path, tmp_path: Path) -> None:
    rows = read_jsonl(contrast / "data" / "test.jsonl")
    data = write_jsonl(tmp_path / "twice.jsonl", [rows[0], rows[1], {**rows[0], "chosen": " Other words."}])
    found = evaluated(contrast, contrast / "dpo", dataset=data, samples=tmp_path / "s.jsonl")
    assert (found.split, found.pairs, found.prompts) == ("train", 3, 2)
    assert [row["prompt"] for row in read_jsonl(tmp_path / "s.jsonl")] == [rows[0]["prompt"], rows[1]["prompt"]]


# ---------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def judge(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random reward model with the tokenizer of the world, whose padding would hide an EOS."""
    folder = tmp_path_factory.mktemp("judge")
    backend = load_tokenizer(contrast / "sft").backend
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(backend), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=backend.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    backend.save_pretrained(folder)
    return folder


def test_a_reward_model_reads_prompt_and_response(contrast: Path, judge: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    found = evaluated(contrast, contrast / "dpo", baseline=contrast / "sft", reward_model=judge, samples=path)
    model, backend = load_reward_model(judge)
    given = []
    for row in read_jsonl(path):
        for response in row["responses"]:
            ids = backend(row["prompt"] + response["response"])["input_ids"][-64:]
            expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0].detach())
            assert response["reward"] == pytest.approx(expected, abs=1e-5)
        given.append(row["responses"][0]["reward"])
    reward = found.policies[0].samples.reward
    assert reward.mean == pytest.approx(sum(given) / len(given))
    assert reward.low <= reward.mean <= reward.high
    won = found.policies[0].against_baseline
    assert won.wins + won.ties + won.losses == len(given)


def test_a_reward_model_gives_one_number(contrast: Path, judge: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for file in judge.iterdir():
        (tmp_path / "two" / file.name).write_bytes(file.read_bytes())
    config = json.loads((judge / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "a", "1": "b"}, {"a": 0, "b": 1}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has one output, this one has 2"):
        load_reward_model(tmp_path / "two")
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_reward_model_of(contrast / "sft", tmp_path)


def load_reward_model_of(causal: Path, tmp_path: Path) -> None:
    """A causal model has no such head: it is not filled with random numbers."""
    folder = tmp_path / "causal"
    folder.mkdir()
    for file in causal.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 1, "id2label": {"0": "r"}}))
    load_reward_model(folder)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("taste:short", DataError, "returned 1 rewards for 12 responses"),
        ("taste:nan", DataError, "not finite"),
        ("taste:words", DataError, "reward that is not a number"),
        ("taste:broken", TisdpoError, "ValueError: no taste"),
        ("taste:absent", UsageError, "no function absent"),
        ("no_such_module_here:f", UsageError, "cannot import no_such_module_here"),
    ],
)
def test_faults_of_a_function_are_errors(contrast: Path, scorer: str, function: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        evaluated(contrast, contrast / "dpo", scorer=function)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == (2 if kind is UsageError else 1)


# ---------------------------------------------------------------- the program


def ask(world: Path, *more: str | Path):
    small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    common = ("-d", world / "data", "--ref-model", world / "sft", *small)
    return run_here("evaluate", "-m", world / "dpo", *common, *more)


def test_the_view_goes_to_stdout(contrast: Path, scorer: str) -> None:
    done = ask(contrast, "--baseline", contrast / "sft", "--scorer", f"{scorer}:length")
    assert done.code == 0, done.err
    for words in (
        "implicit reward accuracy",
        "(estimated)",
        "(exact)",
        "win rate",
        "sign test p",
        "reward (95 %",
    ):
        assert words in " ".join(done.out.split())
    assert "perplexity of the reference" in done.out


def test_in_a_pipe_no_cell_is_broken(contrast: Path, scorer: str) -> None:
    """However long the paths are: one line for each row of the table."""
    models = ",".join(str(contrast / name) for name in ("dpo", "reverse"))
    baseline = ("--baseline", contrast / "sft", "--scorer", f"{scorer}:length")
    done = ask(contrast, "-m", models, *baseline)
    assert done.code == 0, done.err
    title, roles, paths, *rows = done.out.splitlines()
    assert title.endswith("responses to 6 prompts")
    assert roles.split() == ["model", "model", "baseline", "reference"]
    assert paths.split() == [str(contrast / name) for name in ("dpo", "reverse", "sft", "sft")]
    assert len(roles.rstrip()) == len(paths.rstrip()) > 120
    table = rows[: rows.index("")]
    assert [row.split("  ")[0] for row in table] == [label for label, _ in (*_PAIR_ROWS, *_SAMPLE_ROWS)]
    assert {len(re.split(r" {2,}", row.strip())) for row in table} == {5}
    assert rows[rows.index("") + 1].startswith("perplexity of the reference")
    assert len(rows) == len(table) + 5, "a line each for the reference, two win rates and the reward at equal KL"


def test_json_is_one_object_and_the_same_again(contrast: Path, tmp_path: Path) -> None:
    runs = [ask(contrast, "--json", "--samples", tmp_path / f"{i}.jsonl", "--seed", "5") for i in range(2)]
    first, second = (json.loads(done.out) for done in runs)
    assert first == second
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert first["policies"][0]["pairs"]["accuracy"] >= 0
    other = ask(contrast, "--json", "--samples", tmp_path / "2.jsonl", "--seed", "6")
    assert other.code == 0
    assert (tmp_path / "0.jsonl").read_bytes() != (tmp_path / "2.jsonl").read_bytes()


def test_samples_are_side_by_side(contrast: Path, tmp_path: Path) -> None:
    done = ask(contrast, "--baseline", contrast / "sft", "--samples", tmp_path / "s.jsonl", "--samples-per-prompt", "2")
    assert done.code == 0, done.err
    rows = read_jsonl(tmp_path / "s.jsonl")
    assert [row["sample"] for row in rows] == [0, 1] * 6
    assert [response["role"] for response in rows[0]["responses"]] == ["model", "baseline"]
    assert all(r["tokens"] <= 12 and r["reward"] is None for row in rows for r in row["responses"])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".partial-")]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--scorer", "f"], 2, "write module:function"),
        (["--scorer", "a:b", "--reward-model", "x"], 2, "not both"),
        (["--sample-prompts", "0", "--samples", "x.jsonl"], 2, "sample_prompts must not be 0"),
        (["--samples", "no/such/place.jsonl"], 2, "no such directory: no/such"),
        (["--split", "validation"], 2, "has no split 'validation'; available: train, test"),
        (["--max-new-tokens", "3000"], 2, "lower it to"),
        (["--baseline", "nowhere/at/all"], 2, "--baseline nowhere/at/all"),
        (["--temperature", "-1"], 2, "--temperature"),
        (["--max-length", "999999"], 2, "--max-length"),
    ],
)
def test_what_cannot_work_is_one_line(contrast: Path, more: list[str], code: int, message: str) -> None:
    done = ask(contrast, *more)
    assert done.code == code
    assert message in done.error
    assert done.error.startswith("error: ")
    assert done.out == ""


def test_models_may_be_named_by_a_file_and_the_environment(contrast: Path, tmp_path: Path) -> None:
    config = tmp_path / "e.yaml"
    config.write_text("model: a, b\nref_model: c\ndataset: d\nmax_new_tokens: 7\n")
    loaded = load(COMMANDS["evaluate"].settings, {}, config=config, environ={"TISDPO_TEMPERATURE": "0.5"}).settings
    assert loaded.models() == ["a", "b"]
    assert (loaded.max_new_tokens, loaded.temperature) == (7, 0.5)
    with pytest.raises(UsageError, match="a name in the list is empty"):
        load(COMMANDS["evaluate"].settings, {"model": "a,", "ref_model": "c", "dataset": "d"})


def test_models_with_other_tokenizers_are_refused(contrast: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    done = run_here(
        "train-sft", "--init", "-d", contrast / "data", "-o", other, "--vocab-size", "300", "--hidden-size", "32",
        "--layers", "1", "--heads", "2", "--max-steps", "1", "--warmup-steps", "0",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = ask(contrast, "--baseline", other)
    assert (done.code, "another tokenizer" in done.error) == (1, True)


def test_a_loaded_model_samples_the_same_alone_and_in_a_batch(contrast: Path) -> None:
    """The trained family with its cache: one row at a time or all at once."""
    model, tokenizer = load_model(contrast / "dpo"), load_tokenizer(contrast / "dpo")
    prompts = tokenizer.texts.encode(["Hello there, who are you?", "Why?", "\n\nHuman: bread\n\nAssistant:"])
    sampling = Sampling({tokenizer.eos}, tokenizer.pad, 10)
    draws = uniform_draws(0, [(i, 0) for i in range(3)], 10)
    assert sample_all(model, prompts, draws, sampling, 1) == sample_all(model, prompts, draws, sampling, 3)
