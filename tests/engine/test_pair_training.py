"""Training on pairs in this process: every pair counts once however a batch is cut, and the loop does what it says.

Bound: losses and gradients of a batch agree within 1e-5 of their size (float32), however it is cut and ordered.
"""

import copy
import math
import random
from collections import Counter

import oracle
import pytest
import torch
from conftest import Listener
from transformers import Qwen2Config, Qwen2ForCausalLM

from tisdpo_cli.data.stored_examples import EncodedExample
from tisdpo_cli.data.tokens import EncodedPair, Limits, cut
from tisdpo_cli.engine.training.batching import Microbatching, Plan, make_plan, microbatching
from tisdpo_cli.engine.training.best import EvalConfig
from tisdpo_cli.engine.training.optimizer import Schedule
from tisdpo_cli.engine.training.pair_task import PairTask, WeightedPair
from tisdpo_cli.engine.training.sft_task import SftTask
from tisdpo_cli.engine.training.state import CheckpointConfig
from tisdpo_cli.engine.training.step0 import check_step0
from tisdpo_cli.engine.training.trainer import Trainer
from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.method.objectives import resolve_loss
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.outputs import read_metrics
from tisdpo_cli.runs.runtime import Runtime, StopRequest

VOCAB, EOS, BETA = 37, 36, 0.1
BOUND = 1e-5
LN2 = math.log(2)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def make_pairs(count, weighted=False, seed=0):
    """Pairs of many lengths with random tokens, and random weights if asked for."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt, good, bad = ([draw.randrange(EOS) for _ in range(draw.randint(1, 9))] for _ in range(3))
        prompt, (chosen, rejected) = cut(prompt, [good, bad], None, EOS, Limits(64, 32))
        weights = [torch.tensor([draw.uniform(0.2, 2) for _ in side.ids]) for side in (chosen, rejected)]
        pair = EncodedPair(i, f"data.jsonl:{i + 1}", prompt, chosen, rejected)
        made.append(WeightedPair(pair, (weights[0], weights[1])) if weighted else WeightedPair(pair))
    return made


def swapped(pairs):
    return [WeightedPair(pair.tokens.swapped(), pair.weights and pair.weights[::-1]) for pair in pairs]


DPO = resolve_loss("dpo", BETA)


def task_of(pairs, reference, how=DPO):
    scorer = TokenScorer(copy.deepcopy(reference).requires_grad_(False))
    return PairTask(pairs, scorer, how, EOS)


class Fixed(Plan):
    """A plan whose batches are written down."""

    def __init__(self, *batches):
        super().__init__(sum(map(len, batches)), max(map(len, batches)), len(batches), 0)
        object.__setattr__(self, "batches", batches)

    def batch(self, step):
        return list(self.batches[step])


PLAIN_SGD = Schedule("sgd", 0.1, "constant", 0, 0.0, math.inf)


def train(directory, model, task, plan, *, cutting=None, schedule=PLAIN_SGD, held=None):
    """Train in place; the metrics, one record for each update and one for step 0."""
    trainer = Trainer(Runtime(Silent()), TokenScorer(model), task, plan, cutting or Microbatching(micro=8), schedule)
    directory.mkdir(exist_ok=True)
    keeping = CheckpointConfig(directory / "checkpoints", None, 1, "never")
    trainer.train(directory / "metrics.jsonl", keeping, held, lambda _loss: None, StopRequest())
    return read_metrics(directory / "metrics.jsonl")


def flat(model):
    """All weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_of_update(directory, pairs, batch, cutting, how=DPO):
    """The gradient that one update by `Trainer` would follow, and its metrics.

    The policy is another model than the reference, so that no margin is 0.
    """
    policy, accumulated = tiny_model(1), {}
    for name, parameter in policy.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: accumulated.update({name: p.grad.clone()}))
    records = train(directory, policy, task_of(pairs, tiny_model(0), how), Fixed(batch), cutting=cutting)
    return torch.cat([accumulated[name].flatten() for name, _ in policy.named_parameters()]), records[-1]


def oracle_gradient(pairs, name="dpo", **params):
    """The same by the oracle, in float64, one sequence at a time."""
    policy, reference = tiny_model(1).double(), tiny_model(0).double()
    sides = []
    for pair in pairs:
        entry = {}
        for side, weights in zip(("chosen", "rejected"), pair.weights or (None, None), strict=True):
            ids = getattr(pair.tokens, side).ids
            entry[f"policy_{side}_logps"] = oracle.token_logps(policy, pair.tokens.prompt, ids)
            entry[f"reference_{side}_logps"] = oracle.token_logps(reference, pair.tokens.prompt, ids).detach()
            entry[f"{side}_weights"] = [1.0] * len(ids) if weights is None else weights.tolist()
            kls = oracle.token_kls(policy, reference, pair.tokens.prompt, ids)
            entry[f"policy_{side}_kl"], entry[f"reference_{side}_kl"] = kls
        sides.append(entry)
    value = torch.stack([oracle.OBJECTIVES[name](side, BETA, **params) for side in sides]).mean()
    value.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), value.item(), oracle.rewards(sides, BETA)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- a batch, however it is cut


@pytest.mark.parametrize("weighted", [False, True])
def test_an_update_agrees_with_the_oracle(tmp_path, weighted):
    pairs = make_pairs(7, weighted)
    gradient, metrics = gradient_of_update(tmp_path, pairs, range(7), Microbatching(micro=3))
    expected, value, rewards = oracle_gradient(pairs)
    assert (gradient - expected).norm() <= BOUND * expected.norm()
    assert metrics["loss"] == pytest.approx(value, rel=BOUND)
    for name, values in rewards.items():
        assert metrics[f"rewards/{name}"] == pytest.approx(mean(values), abs=BOUND)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=BOUND)
    assert ("weighted_rewards/margins" in metrics) == weighted


OBJECTIVES = [
    ("dpo", {"alpha": 1.0}, True),
    ("dpo", {"alpha": 0.5, "label_smoothing": 0.1}, False),
    ("dpo", {"reference_free": True}, True),
    ("ipo", {}, True),
    ("ipo", {"length_normalize": True}, True),
    ("tdpo1", {}, False),
    ("tdpo2", {}, False),
]


@pytest.mark.parametrize(("name", "params", "weighted"), OBJECTIVES)
def test_an_update_under_every_objective_agrees_with_the_oracle(tmp_path, name, params, weighted):
    pairs = make_pairs(6, weighted)
    gradient, metrics = gradient_of_update(
        tmp_path, pairs, range(6), Microbatching(micro=4), resolve_loss(name, BETA, params)
    )
    expected, value, rewards = oracle_gradient(pairs, name, **params)
    assert (gradient - expected).norm() <= BOUND * expected.norm()
    assert metrics["loss"] == pytest.approx(value, rel=BOUND)
    assert metrics["rewards/margins"] == pytest.approx(mean(rewards["margins"]), abs=BOUND)
    assert ("kl/chosen" in metrics) == (name.startswith("tdpo") or "alpha" in params)


def test_divergences_in_the_metrics_are_sums_over_responses(tmp_path):
    pairs = make_pairs(5, weighted=True)
    for name, params, which in (("dpo", {"alpha": 0.5}, 0), ("tdpo1", {}, 1)):
        plain = pairs if which == 0 else [WeightedPair(pair.tokens) for pair in pairs]
        _, metrics = gradient_of_update(
            tmp_path / name, plain, range(5), Microbatching(micro=2), resolve_loss(name, BETA, params)
        )
        policy, reference = tiny_model(1).double(), tiny_model(0).double()
        sums = {
            side: mean(
                oracle.token_kls(policy, reference, p.tokens.prompt, getattr(p.tokens, side).ids)[which].sum().item()
                for p in pairs
            )
            for side in ("chosen", "rejected")
        }
        assert metrics["kl/chosen"] == pytest.approx(sums["chosen"], rel=BOUND)
        assert metrics["kl/rejected"] == pytest.approx(sums["rejected"], rel=BOUND)
        assert metrics["kl/margins"] == pytest.approx(sums["chosen"] - sums["rejected"], abs=1e-4)


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_microbatches_change_nothing_where_distributions_are_compared(tmp_path, name):
    pairs, how = make_pairs(8), resolve_loss(name, BETA, {"alpha": 0.7})
    whole, expected = gradient_of_update(tmp_path, pairs, range(8), Microbatching(micro=8), how)
    gradient, metrics = gradient_of_update(tmp_path / "x", pairs, [5, 0, 7, 2, 1, 6, 3, 4], Microbatching(micro=3), how)
    assert (gradient - whole).norm() <= BOUND * whole.norm()
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=BOUND)


@pytest.mark.parametrize("weighted", [False, True])
def test_microbatches_accumulation_and_order_change_nothing(tmp_path, weighted):
    pairs = make_pairs(8, weighted)
    whole, expected = gradient_of_update(tmp_path, pairs, range(8), Microbatching(micro=8))
    others = [
        (range(8), Microbatching(micro=1)),
        (range(8), Microbatching(micro=3)),
        (range(8), Microbatching(passes=2)),
        (range(8), Microbatching(passes=11)),
        ([5, 2, 7, 0, 3, 6, 1, 4], Microbatching(micro=2)),
    ]
    timings = {"tokens_per_second", "pairs_per_second"}
    for batch, cutting in others:
        gradient, metrics = gradient_of_update(tmp_path, pairs, batch, cutting)
        assert (gradient - whole).norm() <= BOUND * whole.norm(), cutting
        for name in expected.keys() - timings:
            assert metrics[name] == pytest.approx(expected[name], rel=BOUND, abs=BOUND), (cutting, name)


def test_a_ragged_last_window_counts_every_pair_once(tmp_path):
    """11 pairs in batches of 4: the last update has 3, cut into passes of 2 and 1. It is their mean."""
    pairs = make_pairs(11)
    plan = make_plan(11, 4, 1, None, seed=5)
    last = plan.batch(2)
    assert len(last) == 3
    ragged, metrics = gradient_of_update(tmp_path, pairs, last, Microbatching(micro=2))
    expected, value, _ = oracle_gradient([pairs[i] for i in last])
    assert (ragged - expected).norm() <= BOUND * expected.norm()
    assert metrics["loss"] == pytest.approx(value, rel=BOUND)


def test_a_whole_epoch_does_not_depend_on_the_cutting(tmp_path):
    pairs, plan = make_pairs(11, weighted=True), make_plan(11, 4, 2, None, seed=5)
    ends = []
    for cutting in (Microbatching(micro=4), Microbatching(micro=1), Microbatching(passes=3)):
        policy = tiny_model(1)
        records = train(tmp_path, policy, task_of(pairs, tiny_model(0)), plan, cutting=cutting)
        assert [record["step"] for record in records] == list(range(7))
        ends.append(flat(policy))
    assert (ends[1] - ends[0]).norm() <= BOUND * ends[0].norm()
    assert (ends[2] - ends[0]).norm() <= BOUND * ends[0].norm()


def test_the_reference_and_the_weights_of_tokens_stay_as_they_are(tmp_path):
    pairs = make_pairs(4, weighted=True)
    task = task_of(pairs, tiny_model(0))
    task.reference.requires_grad_(True)  # even then it gets no gradient
    reference, token_weights = flat(task.reference), [pair.weights[0].clone() for pair in pairs]
    policy = tiny_model(0)
    train(tmp_path, policy, task, Plan(4, 4, 3, 0))
    assert torch.equal(flat(task.reference), reference)
    assert not torch.equal(flat(policy), reference)
    assert all(parameter.grad is None for parameter in task.reference.parameters())
    assert all(torch.equal(pair.weights[0], w) for pair, w in zip(pairs, token_weights, strict=True))


def test_unit_weights_train_as_no_weights_to_the_last_bit(tmp_path):
    plain = make_pairs(6)
    unit = [
        WeightedPair(p.tokens, (torch.ones(len(p.tokens.chosen.ids)), torch.ones(len(p.tokens.rejected.ids))))
        for p in plain
    ]
    ends = []
    for pairs in (plain, unit):
        policy = tiny_model(0)
        train(tmp_path, policy, task_of(pairs, tiny_model(0)), Plan(6, 4, 4, 0))
        ends.append(flat(policy))
    assert torch.equal(*ends)


# ---------------------------------------------------------------- forward and reverse


def test_both_directions_start_at_ln_2_and_go_apart(tmp_path):
    """From the reference, one update by the swapped pairs is the opposite of one by the pairs."""
    pairs, start = make_pairs(6), tiny_model(0)
    moves, first = [], []
    for some in (pairs, swapped(pairs)):
        policy = tiny_model(0)
        records = train(tmp_path, policy, task_of(some, start), Plan(6, 6, 1, 0))
        first.append(records[0])
        moves.append(flat(policy) - flat(start))
    for record in first:
        assert record["step"] == 0
        assert record["loss"] == pytest.approx(LN2, abs=1e-6)
        assert record["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first[0]["logps/chosen"] == pytest.approx(first[1]["logps/rejected"])
    assert (moves[0] + moves[1]).norm() <= 1e-4 * moves[0].norm()


def test_a_handful_of_pairs_is_learned_forward_and_unlearned_in_reverse(tmp_path):
    pairs, schedule = make_pairs(5), Schedule("adamw", 3e-3, "constant", 0, 0.0, 10.0)
    forward_sense = task_of(pairs, tiny_model(0))
    for some, accuracy in ((pairs, 1.0), (swapped(pairs), 0.0)):
        records = train(
            tmp_path, tiny_model(0), task_of(some, tiny_model(0)), Plan(5, 5, 25, 0), schedule=schedule,
            held=EvalConfig(forward_sense, None, 2),
        )  # fmt: skip
        last = records[-1]
        assert last["rewards/accuracies"] == 1.0
        assert last["loss"] < LN2 - 0.05
        assert last["eval/rewards/accuracies"] == accuracy
        assert (last["eval/rewards/margins"] > 0) == (accuracy == 1)
        assert last["eval/loss"] < LN2 if accuracy else last["eval/loss"] > LN2


def test_evaluation_happens_at_the_start_every_n_updates_and_at_the_end(tmp_path):
    pairs = make_pairs(6)
    held = EvalConfig(task_of(make_pairs(5, seed=9), tiny_model(0)), 2, 2)
    records = train(tmp_path, tiny_model(0), task_of(pairs, tiny_model(0)), Plan(6, 2, 5, 0), held=held)
    assert [record["step"] for record in records if "eval/loss" in record] == [0, 2, 4, 5]
    assert records[0]["eval/loss"] == pytest.approx(LN2, abs=1e-6)
    assert all(f"eval/{name}" in records[-1] for name in held.task.metrics)


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path):
    held, task = (task_of(make_pairs(count, seed=count), tiny_model(0)) for count in (7, 4))
    found = []
    for size in (1, 3, 16):
        records = train(tmp_path, tiny_model(1), task, Plan(4, 4, 1, 0), held=EvalConfig(held, None, size))
        found.append({name: value for name, value in records[-1].items() if name.startswith("eval/")})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=BOUND, abs=BOUND)


# ---------------------------------------------------------------- faults


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(tmp_path):
    """The second update holds the bad pair, so the weights are those after the first one, bit by bit."""
    pairs = make_pairs(8, weighted=True)
    pairs[5].weights[0][0] = math.nan
    batches = [0, 1, 2, 3], [4, 5, 6, 7]
    after_one, stopped = tiny_model(0), tiny_model(0)
    train(tmp_path / "one", after_one, task_of(pairs, tiny_model(0)), Fixed(batches[0]), cutting=Microbatching(micro=1))
    with pytest.raises(TrainingError) as fault:
        train(tmp_path / "two", stopped, task_of(pairs, tiny_model(0)), Fixed(*batches), cutting=Microbatching(micro=1))
    assert "loss of step 2 is not finite" in str(fault.value)
    assert "data.jsonl:6" in str(fault.value)
    assert "data.jsonl:5" not in str(fault.value)
    assert torch.equal(flat(stopped), flat(after_one))
    assert [record["step"] for record in read_metrics(tmp_path / "two" / "metrics.jsonl")] == [0, 1]


def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(tmp_path):
    """A weight of 1e38 times a log-ratio of 0 is a loss of ln 2, but its gradient overflows."""
    pairs = make_pairs(2, weighted=True)
    pairs[1].weights[0][:] = 1e38
    policy = tiny_model(0)
    with pytest.raises(TrainingError, match=r"gradient of step 1 is not finite.*data\.jsonl:"):
        train(tmp_path, policy, task_of(pairs, tiny_model(0)), Fixed([0, 1]))
    assert torch.equal(flat(policy), flat(tiny_model(0)))


def start(value: float, loss=DPO, same: bool = True, precision: str = "float32", margin: float = 1.0) -> list[str]:
    """Check a loss before the first update; returns what is reported. The margin is of log-ratios, in nats."""
    listener = Listener()
    check_step0({"loss": value, "rewards/margins": loss.beta * margin}, loss, precision, same, listener)
    return listener.said


@pytest.mark.parametrize("value", [0.7, 0.6933, math.nan, math.inf])
def test_a_wrong_loss_before_the_first_update_stops_the_run(value):
    """ln 2 = 0.69315; where policy and reference are the same model nothing else will do."""
    with pytest.raises(TrainingError, match="ln 2"):
        start(value)


def test_ln_2_before_the_first_update_is_fine():
    assert start(LN2 + 5e-5) == ["step-0 loss 0.6932 = ln 2 as expected"]
    start(1.5, same=False)


def test_every_objective_has_its_own_value_before_the_first_update():
    start(25.0, resolve_loss("ipo", BETA))
    start(LN2, resolve_loss("tdpo2", BETA))
    start(3.0, resolve_loss("dpo", BETA, {"reference_free": True}))
    with pytest.raises(TrainingError, match="1/"):
        start(24.9, resolve_loss("ipo", BETA))


def test_in_bf16_rounding_is_no_fault_and_more_than_rounding_is():
    """Where a kernel differs with and without a gradient; on CPUs both passes give the same bits."""
    assert "up to bf16 rounding" in start(0.6937, precision="bf16", margin=-0.3)[0]
    assert "as expected" in start(LN2, precision="bf16", margin=0.0)[0]
    for margin in (0.8, -0.8, math.nan):
        with pytest.raises(TrainingError, match="random"):
            start(0.75, precision="bf16", margin=margin)


# ---------------------------------------------------------------- learning rate and clipping


@pytest.mark.parametrize(
    ("given", "updates", "steps"),
    [
        (150, 10, 150),
        (1, 10, 1),
        (0, 10, 0),
        (0.1, 30, 3),
        (0.07, 100, 7),
        (0.1, 31, 4),
        (0.001, 10, 1),
        (0.29, 100, 29),
    ],
)
def test_a_share_of_warm_up_steps_is_rounded_up_exactly(given: float, updates: int, steps: int) -> None:
    assert Schedule("sgd", 1.0, "constant", given, 0.0, 1.0).warmup(updates) == steps


def test_the_schedule_moves_the_weights(tmp_path):
    """Plain SGD moves by rate × gradient; the logged rate is the one that was used."""
    policy = tiny_model(1)
    schedule = Schedule("sgd", 0.4, "constant", 3, 0.0, math.inf)
    records = train(tmp_path, policy, task_of(make_pairs(4), tiny_model(0)), Plan(4, 4, 1, 0), schedule=schedule)
    assert records[1]["learning_rate"] == pytest.approx(0.1)
    moved = flat(policy) - flat(tiny_model(1))
    assert moved.norm().item() == pytest.approx(0.1 * records[1]["grad_norm"], rel=1e-4)


def test_long_gradients_are_clipped_and_logged_unclipped(tmp_path):
    policy = tiny_model(1)
    schedule = Schedule("sgd", 1.0, "constant", 0, 0.0, 0.01)
    records = train(tmp_path, policy, task_of(make_pairs(4), tiny_model(0)), Plan(4, 4, 1, 0), schedule=schedule)
    moved = flat(policy) - flat(tiny_model(1))
    assert records[1]["grad_norm"] > 0.1
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("examples", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_every_epoch_covers_every_example_once(examples, batch_size):
    plan = make_plan(examples, batch_size, 3, None, seed=1)
    assert plan.updates == 3 * math.ceil(examples / batch_size)
    for epoch in range(3):
        steps = range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch)
        batches = [plan.batch(step) for step in steps]
        assert sorted(i for batch in batches for i in batch) == list(range(examples))
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_the_order_is_seeded_and_differs_by_epoch():
    def order(seed, epoch):
        plan = make_plan(50, 50, 2, None, seed)
        return tuple(plan.batch(epoch))

    assert order(0, 0) == order(0, 0)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(2)}) == 6
    assert order(0, 0) != tuple(range(50))


def test_the_order_does_not_depend_on_the_batch_size_or_on_other_randomness():
    torch.manual_seed(1)
    big = make_plan(12, 12, 1, None, 3).batch(0)
    torch.manual_seed(2)
    small = make_plan(12, 5, 1, None, 3)
    assert small.batch(0) + small.batch(1) + small.batch(2) == big


def test_updates_are_counted_by_epochs_or_by_max_steps():
    assert make_plan(10, 4, 1, None, 0).updates == 3
    assert make_plan(10, 4, 0.5, None, 0).updates == 2
    assert make_plan(10, 4, 0.01, None, 0).updates == 1
    assert make_plan(10, 5, 1.5, None, 0).updates == 3
    repeated = make_plan(10, 4, 1, 8, 0)
    assert repeated.updates == 8
    assert Counter(i for step in range(6) for i in repeated.batch(step)) == dict.fromkeys(range(10), 2)


# ---------------------------------------------------------------- microbatches


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("passes", [None, 1, 2, 4])
def test_every_example_is_in_one_pass_and_ranks_have_as_many_passes(world, passes):
    draw = random.Random(0)
    costs = [draw.randint(2, 99) for _ in range(60)]
    for size in range(1, 30):
        for micro in (1, 2, 3, 8, 64):
            batch = draw.sample(range(60), size)
            ranks = Microbatching(micro=micro, passes=passes).split(batch, costs, world)
            assert len(ranks) == world
            assert len({len(rank) for rank in ranks}) == 1
            assert sorted(i for rank in ranks for one in rank for i in one) == sorted(batch)
            sizes = [len(one) for rank in ranks for one in rank]
            assert max(sizes) - min(sizes) <= 1
            if passes is None:
                assert max(sizes) <= micro
                assert len(ranks[0]) == math.ceil(size / (micro * world))
            else:
                assert len(ranks[0]) == passes


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_passes_hold_so_many_tokens_and_are_of_like_size(world):
    draw = random.Random(1)
    costs = [draw.randint(2, 99) for _ in range(60)]
    for size in range(1, 40, 3):
        for tokens in (1, 60, 99, 250, 10_000):
            batch = draw.sample(range(60), size)
            ranks = Microbatching(tokens=tokens).split(batch, costs, world)
            assert ranks == Microbatching(tokens=tokens).split(batch[::-1], costs, world) or len(set(costs)) < 60
            assert len(ranks) == world
            assert len({len(rank) for rank in ranks}) == 1
            assert sorted(i for rank in ranks for one in rank for i in one) == sorted(batch)
            held = [sum(costs[i] for i in one) for rank in ranks for one in rank]
            assert all(
                total <= tokens or len(one) == 1 for total, one in zip(held, [o for r in ranks for o in r], strict=True)
            )
            # No more passes than needed by much, and none much lighter than the others where there is a choice.
            assert len(ranks[0]) <= math.ceil(sum(costs[i] for i in batch) / (tokens * world)) * 2 + 1 or tokens < 99
            if size > 3 * len(held):
                assert max(held) - min(held) <= max(costs)


def test_a_budget_of_tokens_changes_nothing_but_rounding(tmp_path):
    pairs = make_pairs(9, weighted=True)
    whole, expected = gradient_of_update(tmp_path, pairs, range(9), Microbatching(tokens=10_000))
    for tokens in (1, 40, 90):
        gradient, metrics = gradient_of_update(tmp_path / str(tokens), pairs, range(9), Microbatching(tokens=tokens))
        assert (gradient - whole).norm() <= BOUND * whole.norm()
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=BOUND)


def test_examples_of_like_length_go_together():
    costs = [10, 90, 11, 91, 12, 92]
    (rank,) = Microbatching(micro=3).split(range(6), costs, world=1)
    assert sorted(sorted(one) for one in rank) == [[0, 2, 4], [1, 3, 5]]


def test_batch_size_micro_batch_and_accumulation():
    assert microbatching(None, 4, 2, 99, 3, 32) == (24, Microbatching(micro=4))
    assert microbatching(24, 4, 2, 99, 3, 32) == (24, Microbatching(micro=4))
    assert microbatching(None, 4, None, 99, 1, 32) == (32, Microbatching(micro=4))
    assert microbatching(16, None, 4, 99, 1, 32)[1].split(range(16), [1] * 16, 1)[0] == [
        list(range(k, k + 4)) for k in range(0, 16, 4)
    ]
    assert microbatching(2, None, None, 99, 1, 32) == (2, Microbatching(tokens=99))
    with pytest.raises(UsageError, match=r"32.*4.*2.*24"):
        microbatching(32, 4, 2, 99, 3, 32)


# ---------------------------------------------------------------- the same loop, supervised


def test_supervised_loss_is_a_mean_over_tokens_however_it_is_cut(tmp_path):
    """Not a mean of means: the examples have 1 to 9 tokens. The given tokens are not learned."""
    pairs = make_pairs(7)
    examples = [EncodedExample(f"f:{i}", p.tokens.prompt, p.tokens.chosen.ids) for i, p in enumerate(pairs)]
    task = SftTask(examples, EOS)
    exact = tiny_model(1).double()
    logps = torch.cat([oracle.token_logps(exact, e.given, e.learned) for e in examples])
    for cutting in (Microbatching(micro=7), Microbatching(micro=2)):
        records = train(tmp_path, tiny_model(1), task, Fixed(range(7)), cutting=cutting)
        assert records[0]["loss"] == pytest.approx(-logps.mean().item(), rel=BOUND)
        assert records[0]["token_probability"] == pytest.approx(logps.exp().mean().item(), rel=BOUND)
        assert records[1]["loss"] == pytest.approx(records[0]["loss"], rel=BOUND)
