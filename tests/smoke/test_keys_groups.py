"""Keys of method grpo, and those of `rollout` and `rewards`: each does what it says, in a run of one step.

Losses are held to those of the papers in plain numpy (`group_papers`), with the axes written out here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from group_papers import step_loss
from strop.config.sections.rollout import RolloutSection
from strop.errors import ConfigError, TrainingError
from strop.rollout import sampler

PLAIN = {
    "advantage": "group",
    "importance_sampling_level": "token",
    "gate": "clip",
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "aggregation": "sequence",
    "normalizer_length": None,
    "beta": 0.0,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "use_bias_correction_kl": True,
    "sampler_correction": "none",
    "sampler_correction_max": 3.0,
    "sampler_correction_min": 0.0,
    "mask_truncated_completions": False,
    "entropy_coef": 0.0,
}
"""What algorithm grpo is, and the defaults."""

BY_NAME: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "mean", "aggregation": "constant"},
    "dapo": {"aggregation": "token", "epsilon_high": 0.28},
    "bnpo": {"aggregation": "token"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"gate": "cispo", "aggregation": "token", "epsilon": 1.0, "epsilon_high": 4.0},
    "sapo": {"gate": "sapo"},
    "gmpo": {"gate": "gmpo", "epsilon": 0.4, "epsilon_high": 0.4},
    "rloo": {"advantage": "rloo", "importance_sampling_level": "sequence_product", "kl_in": "reward"},
    "reinforce++": {"advantage": "reinforce++", "aggregation": "token", "kl_in": "reward"},
    "maxrl": {"advantage": "maxrl", "aggregation": "sequence_sum"},
}
"""Algorithm -> what it is, where that is not grpo."""

REWARDS = '''
import time

def codes(completions):
    """Differs from text to text."""
    return [sum(map(ord, text)) % 17 / 17 for text in completions]

def scaled(completions, factor):
    return [factor * len(text) for text in completions]

def first_fails(completions, prompts):
    """No number for the first completion of half of the prompts."""
    half = sum(map(ord, prompts[0])) % 2
    return [None if half and i == 0 else 1.0 + i for i, _ in enumerate(completions)]

def half_dead(completions, prompts):
    """The same number for all completions of half of the prompts."""
    dead = sum(map(ord, prompts[0])) % 2
    return [0.0 if dead else float(i) for i, _ in enumerate(completions)]

def hungry(completions):
    held = b"x" * (1 << 30)
    time.sleep(0.5)
    return [float(len(held) > 0) for _ in completions]

def slow(completions):
    time.sleep(0.4)
    return [1.0 for _ in completions]
'''

OF_ROLLOUT = frozenset(RolloutSection.model_fields)
HELD_OUT = {"validation_split": 0.25, "eval_steps": 1}
DISTILL = {"method": "distill", "max_steps": 1, "validation_split": 0}

Train = Callable[..., Any]
Drawn = Callable[..., list[tuple[torch.Tensor, int, float]]]


@pytest.fixture
def follow(runs: Any, group_step: Any) -> Train:
    """Trains one step on the groups of a file under these keys. Its loss is the paper's under the same keys, or under
    `means` where that is said."""

    def train(means: dict[str, Any] | None = None, **keys: Any) -> Any:
        settings = {**PLAIN, **(keys if means is None else means)}
        reference = {"ref_model_id": str(runs.files["other"])} if settings["beta"] else {}
        given = {f"post_training.{name}": value for name, value in {"method": "grpo", **keys, **reference}.items()}
        source = {"dataset.train_file": str(runs.files["groups"]), "validation_split": 0, "max_completion_length": 9}
        run = runs({**given, **source, "max_steps": 1})
        assert loss(run) == pytest.approx(step_loss(SimpleNamespace(**settings), group_step, group_step), rel=1e-4)
        return run

    return train


@pytest.fixture
def sample(runs: Any) -> Train:
    """Trains one step on completions that the policy samples; `rewards` are names of functions above, or sections."""
    file = runs.folder / "rewards.py"
    file.write_text(REWARDS)

    def named(reward: Any) -> dict[str, Any]:
        section = {"name": reward} if isinstance(reward, str) else reward
        return {**section, "name": f"{file}:{section['name']}"} if f"def {section['name']}" in REWARDS else section

    def train(*rewards: Any, **keys: Any) -> Any:
        source = {"dataset.train_file": str(runs.files["singles"]), "validation_split": 0, "max_completion_length": 6}
        own = {name: value for name, value in {"num_generations": 3, **keys}.items() if name in OF_ROLLOUT}
        others = {name: value for name, value in keys.items() if name not in OF_ROLLOUT}
        rollout = {f"rollout.{name}": value for name, value in own.items()}
        method = {"method": "grpo", "epsilon": 1e-3, "max_steps": 1}
        return runs({**method, **source, **rollout, **others, "rewards": [named(r) for r in rewards or ["codes"]]})

    return train


def loss(run: Any) -> float:
    value: float = run.series("loss")[0]
    return value


def are_apart(runs: Sequence[Any]) -> bool:
    """Whether no two have the same loss."""
    losses = sorted(map(loss, runs))
    return all(b - a > 1e-3 * abs(b) for a, b in pairwise(losses))


def rollouts(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture
def drawn(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Drawn:
    """Of every token that a run sampled, by hand: the probabilities of all that the tokenizer has (the model has more,
    which are never sampled), the one that was drawn, and the log-prob that was recorded."""
    model, num_tokens = make_model(0), len(make_tokenizer())

    def probs(run: Any, temperature: float = 1.0) -> list[tuple[torch.Tensor, int, float]]:
        found = []
        for row in rollouts(run):
            start = len(row["prompt_ids"]) - 1
            for ids, logps in zip(row["completion_ids"], row["old_logps"], strict=True):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([row["prompt_ids"] + ids])).logits[0, start:-1].double()
                found += zip((logits / temperature).softmax(-1)[:, :num_tokens], ids, logps, strict=True)
        assert len(found) > 20
        return found

    return probs


# ---- post_training


@pytest.mark.nightly
def test_post_training__algorithm(follow: Train) -> None:
    for name, axes in BY_NAME.items():
        known = {"normalizer_length": 9} if axes.get("aggregation") == "constant" else {}
        run = follow(algorithm=name, means={**axes, **known})
        assert {key: run.config["post_training"][key] for key in axes} == axes
    run = follow(algorithm="dapo", epsilon_high=0.05, means={**BY_NAME["dapo"], "epsilon_high": 0.05})  # it wins
    assert loss(run) != loss(follow(algorithm="dapo", means=BY_NAME["dapo"]))


@pytest.mark.nightly
def test_post_training__advantage(follow: Train) -> None:
    names = ("group", "mean", "batch", "rloo", "maxrl", "opo", "reinforce++", "reinforce++_baseline", "none")
    assert are_apart([follow(advantage=name) for name in names])


def test_post_training__entropy_coef(follow: Train) -> None:
    """Of the distributions of the model, as it writes them by hand."""
    none, some, more = (
        follow(algorithm="dapo", entropy_coef=c, means={**BY_NAME["dapo"], "entropy_coef": c}) for c in (0.0, 0.1, 0.3)
    )
    assert are_apart([none, some, more])
    assert "entropy" not in none.metrics[0] and 0 < some.series("entropy")[0] == more.series("entropy")[0]
    assert some.series("loss/entropy")[0] == pytest.approx(-0.1 * some.series("entropy")[0])


@pytest.mark.nightly
def test_post_training__gate(follow: Train) -> None:
    """Bounds that are not given are those of the gate."""
    bounds: dict[str, dict[str, float]] = {
        "cispo": {"epsilon": 1.0, "epsilon_high": 4.0},
        "gmpo": {"epsilon": 0.4, "epsilon_high": 0.4},
    }
    gates = ("clip", "cispo", "sapo", "gmpo", "none")
    assert are_apart([follow(gate=gate, means={"gate": gate, **bounds.get(gate, {})}) for gate in gates])


def test_post_training__importance_sampling_level(follow: Train) -> None:
    levels = ("token", "sequence", "sequence_product")
    assert are_apart([follow(importance_sampling_level=level) for level in levels])


def acts_on_its_side_alone(key: str, own: str, other: str, follow: Train) -> None:
    narrow, wide = follow(**{key: 0.05}), follow(**{key: 0.6})
    assert are_apart([narrow, wide])
    shares = {side: [run.series(f"clip_ratio/{side}_mean")[0] for run in (narrow, wide)] for side in (own, other)}
    assert shares[own][0] > shares[own][1] and shares[other][0] == shares[other][1]


def test_post_training__epsilon(follow: Train) -> None:
    acts_on_its_side_alone("epsilon", "low", "high", follow)


def test_post_training__epsilon_high(follow: Train) -> None:
    acts_on_its_side_alone("epsilon_high", "high", "low", follow)


def test_post_training__delta(follow: Train) -> None:
    assert are_apart([follow(delta=delta) for delta in (None, 1.2, 1.4)])


def test_post_training__sapo_temperature_pos(follow: Train) -> None:
    assert are_apart([follow(gate="sapo", sapo_temperature_pos=k) for k in (1.0, 4.0)])


def test_post_training__sapo_temperature_neg(follow: Train) -> None:
    assert are_apart([follow(gate="sapo", sapo_temperature_neg=k) for k in (1.05, 4.0)])


@pytest.mark.nightly
def test_post_training__aggregation(follow: Train) -> None:
    runs = [follow(aggregation=name) for name in ("sequence", "token", "sequence_sum", "prompt")]
    runs.append(follow(aggregation="constant", means={"aggregation": "constant", "normalizer_length": 9}))
    assert are_apart(runs)


@pytest.mark.nightly
def test_post_training__normalizer_length(follow: Train) -> None:
    """Null is training.max_completion_length, which is 9 here."""
    none, nine, three = (
        follow({"aggregation": "constant", "normalizer_length": n or 9}, aggregation="constant", normalizer_length=n)
        for n in (None, 9, 3)
    )
    assert loss(none) == loss(nine) and loss(three) == pytest.approx(3 * loss(nine))


@pytest.mark.nightly
def test_post_training__kl_in(follow: Train) -> None:
    in_loss, in_reward = (follow(beta=0.2, kl_in=place) for place in ("loss", "reward"))
    assert are_apart([follow(), in_loss, in_reward])
    assert "kl" in in_loss.metrics[0] and "kl" not in in_reward.metrics[0]


@pytest.mark.nightly
def test_post_training__kl_estimator(follow: Train) -> None:
    k1, k2, k3, both = (follow(beta=0.2, kl_estimator=name) for name in ("k1", "k2", "k3", "k3+"))
    assert are_apart([k1, k2, k3])
    assert loss(both) == pytest.approx(loss(k3), rel=1e-6)
    # with the ratio, the gradient of k3 is that of k2 as well
    names = ("k2", "k3", "k3+")
    runs = [follow(beta=2.0, kl_estimator=name, use_bias_correction_kl=False) for name in names]
    slopes = [run.series("grad_norm")[0] for run in runs]
    assert slopes[2] == pytest.approx(slopes[0], rel=1e-5) and slopes[2] != pytest.approx(slopes[1], rel=1e-3)


@pytest.mark.nightly
def test_post_training__use_bias_correction_kl(follow: Train) -> None:
    assert are_apart([follow(beta=0.2, use_bias_correction_kl=wanted) for wanted in (True, False)])


@pytest.mark.nightly
def test_post_training__sampler_correction(follow: Train) -> None:
    bounds = {"sampler_correction_max": 1.25}
    kinds = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")
    assert are_apart([follow(), *(follow(sampler_correction=kind, **bounds) for kind in kinds)])


def test_post_training__sampler_correction_max(follow: Train) -> None:
    assert are_apart([follow(sampler_correction="token_truncate", sampler_correction_max=v) for v in (1.1, 1.25, 3.0)])


@pytest.mark.nightly
def test_post_training__sampler_correction_min(follow: Train) -> None:
    assert are_apart([follow(sampler_correction="token_mask", sampler_correction_min=v) for v in (0.0, 0.7, 0.9)])


# ---- rollout


@pytest.mark.nightly
def test_rollout__enabled(runs: Any, sample: Train, follow: Train) -> None:
    run = sample(enabled=True)
    assert {len(row["completion_ids"]) for row in rollouts(run)} == {3}, "not those of the file, which has one each"
    assert not (follow().path / "rollouts.jsonl").exists()
    keys = {"method": "grpo", "dataset.validation_split": 0, "rollout.num_generations": 2}
    assert runs.config({**keys, "rewards": ["format"]}).rollout.enabled, "the section switches it on"
    file = {"dataset.train_file": str(runs.files["groups"]), "max_steps": 1}
    off = runs({**keys, **file, "rollout.enabled": False})
    assert loss(off) == loss(follow()) and not (off.path / "rollouts.jsonl").exists()


@pytest.mark.nightly
def test_rollout__num_generations(sample: Train) -> None:
    two, three = (rollouts(sample(num_generations=n)) for n in (2, 3))
    assert {len(row["completion_ids"]) for row in three} == {3}
    assert [row["completion_ids"] for row in two] == [row["completion_ids"][:2] for row in three]


@pytest.mark.nightly
def test_rollout__temperature(sample: Train, drawn: Drawn) -> None:
    run = sample(temperature=0.5)
    for probs, token, logp in drawn(run, temperature=0.5):
        assert logp == pytest.approx(float(probs[token].log()), abs=1e-4)
    assert run.series("reward_std")[0] > 0 and run.series("clip_ratio/region_mean")[0] == 0, "training divides as well"
    assert rollouts(run)[0]["completion_ids"] != rollouts(sample())[0]["completion_ids"]


@pytest.mark.nightly
def test_rollout__top_k(sample: Train, drawn: Drawn) -> None:
    ranks = [[int((probs > probs[token]).sum()) for probs, token, _ in drawn(sample(top_k=k))] for k in (0, 1, 3)]
    assert max(ranks[0]) > 2 and max(ranks[1]) == 0 and max(ranks[2]) == 2


@pytest.mark.nightly
def test_rollout__top_p(sample: Train, drawn: Drawn) -> None:
    likelier = [
        [float(probs[probs > probs[token]].sum() / probs.sum()) for probs, token, _ in drawn(sample(top_p=p))]
        for p in (1.0, 0.3)
    ]
    assert max(likelier[0]) > 0.6 and 0.1 < max(likelier[1]) < 0.3


@pytest.mark.nightly
def test_rollout__min_p(sample: Train, drawn: Drawn) -> None:
    shares = [[float(probs[token] / probs.max()) for probs, token, _ in drawn(sample(min_p=p))] for p in (0.0, 0.4)]
    assert min(shares[0]) < 0.2 and 0.4 < min(shares[1]) < 0.9


@pytest.mark.nightly
def test_rollout__stop(sample: Train) -> None:
    free, stopped = (sample(stop=stop, max_completion_length=16) for stop in ([], ["e", "a"]))
    cut = 0
    for before, after in zip(rollouts(free), rollouts(stopped), strict=True):
        for whole, part, text, ended in zip(
            before["completion_ids"], after["completion_ids"], after["texts"], after["ended"], strict=True
        ):
            assert part == whole[: len(part)]
            assert ended if "e" in text or "a" in text else part == whole
            cut += len(part) < len(whole)
    assert cut > 3
    clipped = [run.series("completions/clipped_ratio")[0] for run in (free, stopped)]
    assert clipped[1] < clipped[0]
    assert sample(stop=["\n\n"]).config["rollout"]["stop"] == ["\n\n"], "white space is a text, too"
    with pytest.raises(ConfigError, match="stop is empty"):
        sample(stop=[""])


def test_rollout__stop_token_ids(sample: Train) -> None:
    ids = list(range(4, 200, 3))
    for row in rollouts(sample(stop_token_ids=ids)):
        for own, ended in zip(row["completion_ids"], row["ended"], strict=True):
            assert not set(ids) & set(own[:-1]) and ended == (own[-1] in {3, *ids})
    with pytest.raises(ConfigError, match="the tokenizer has no such token"):
        sample(stop_token_ids=[100_000])


@pytest.mark.nightly
def test_rollout__batch_tokens(sample: Train, watched: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    decode = sampler._Rows.decode

    def noted(self: Any, *args: Any) -> None:
        tokens.append(self._num * sum(len(prompt.ids) + prompt.room for prompt in self._prompts))
        decode(self, *args)

    watched.setattr(sampler._Rows, "decode", noted)
    found = {}
    for most in (10_000, 150):
        tokens.clear()
        ids = [row["completion_ids"] for row in rollouts(sample(batch_tokens=most))]
        found[most] = (ids, list(tokens))
    assert found[10_000][0] == found[150][0]
    assert len(found[10_000][1]) == 1 < len(found[150][1])
    assert max(found[150][1]) <= 150 < found[10_000][1][0]


@pytest.mark.nightly
def test_rollout__reward_timeout(sample: Train) -> None:
    assert sample("slow", reward_timeout=30).series("reward") == [1.0]
    with pytest.raises(TrainingError, match=r"more than 0\.2 seconds"):
        sample("slow", reward_timeout=0.2)


@pytest.mark.nightly
def test_rollout__on_reward_error(sample: Train) -> None:
    with pytest.raises(TrainingError, match="no finite number for 1 of 3 completions"):
        sample("first_fails")
    skipped, valued = (sample("first_fails", on_reward_error=way) for way in ("skip_group", "value"))
    failed = skipped.series("rewards/failed")[0]
    assert 0 < failed < 4 and valued.series("rewards/failed")[0] == failed, "one in every prompt that fails"
    assert skipped.series("num_groups")[0] == len(rollouts(skipped)) == 4 - failed
    assert valued.series("num_groups")[0] == len(rollouts(valued)) == 4
    assert [row["rewards"] for row in rollouts(skipped)] == [[1, 2, 3]] * int(4 - failed)


@pytest.mark.nightly
def test_rollout__reward_error_value(sample: Train) -> None:
    for value in (0.0, -2.5):
        run = sample("first_fails", on_reward_error="value", reward_error_value=value)
        assert {tuple(row["rewards"]) for row in rollouts(run)} == {(1, 2, 3), (value, 2, 3)}
    with pytest.raises(ConfigError, match="does not read it"):
        sample("codes", reward_error_value=1.0)


# ---- rewards


def test_top__rewards(sample: Train) -> None:
    """A text is a reward of weight 1; the settings are arguments; the sum of all is what trains."""
    ten = {"name": "scaled", "weight": -0.5, "settings": {"factor": 10}}
    shipped = {"name": "regex", "settings": {"pattern": "e"}}
    run = sample("codes", ten, shipped)
    for row in rollouts(run):
        each = [(sum(map(ord, text)) % 17 / 17, 10 * len(text), float("e" in text)) for text in row["texts"]]
        for own, wanted in zip(zip(*row["rewards_by_name"].values(), strict=True), each, strict=True):
            assert own == pytest.approx(wanted)
        assert row["rewards"] == pytest.approx([codes - 0.5 * scaled + e for codes, scaled, e in each])
    totals = [r for row in rollouts(run) for r in row["rewards"]]
    assert run.series("reward")[0] == pytest.approx(sum(totals) / len(totals))
    assert len(set(totals)) > 1


@pytest.mark.nightly
def test_rollout__num_generations_eval(sample: Train) -> None:
    held = {**HELD_OUT, "temperature_eval": 1.0}
    one, three = (sample(num_generations_eval=n, **held).series("reward", "eval") for n in (1, 3))
    assert one != three, "more completions of the same prompts"


@pytest.mark.nightly
def test_rollout__temperature_eval(sample: Train) -> None:
    greedy, drawn_at_one = (sample(temperature_eval=t, **HELD_OUT).series("reward", "eval") for t in (0.0, 1.0))
    assert greedy != drawn_at_one


@pytest.mark.nightly
def test_rollout__steps_per_generation(sample: Train) -> None:
    """Two steps of one sampling: both are taken on completions that the weights before the first one sampled."""
    one, two = (sample(steps_per_generation=n, max_steps=2, learning_rate=0.05) for n in (1, 2))
    assert rollouts(one)[0] == rollouts(two)[0]
    assert one.series("clip_ratio/region_mean")[1] == 0 < two.series("clip_ratio/region_mean")[1]


@pytest.mark.nightly
def test_rollout__num_iterations(sample: Train) -> None:
    once, twice = (sample(num_iterations=n, max_steps=2, learning_rate=0.05) for n in (1, 2))
    assert len(rollouts(once)) == 2 * len(rollouts(twice)), "the second step trains on what the first one sampled"


@pytest.mark.nightly
def test_rollout__dynamic_sampling(sample: Train) -> None:
    as_drawn, refilled = (sample("half_dead", dynamic_sampling=wanted) for wanted in (False, True))
    assert refilled.series("rollout/groups_without_signal")[0] > 0
    assert len(rollouts(refilled)) > len(rollouts(as_drawn)), "more prompts in place of those without signal"
    assert refilled.series("frac_reward_zero_std") == [0.0] < as_drawn.series("frac_reward_zero_std")


def test_post_training__online(sample: Train) -> None:
    run = sample(method="dpo", online=True, epsilon=None)
    (record,) = run.metrics
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-5) and record["rollout/reward_gap"] > 0
    assert any(row["pair"] for row in rollouts(run))


@pytest.mark.nightly
def test_rollout__max_refills(sample: Train) -> None:
    few, more = (sample("half_dead", dynamic_sampling=True, max_refills=n) for n in (1, 4))
    assert few.series("rollout/refilled")[0] <= more.series("rollout/refilled")[0]
    assert len(rollouts(few)) < len(rollouts(more))


def test_rollout__probe_prompts(sample: Train) -> None:
    none, some = (sample("half_dead", probe_prompts=n) for n in (None, 2))
    assert not (none.path / "forecast.json").exists(), "the run is short"
    assert json.loads((some.path / "forecast.json").read_text())["num_prompts"] == 2
    assert rollouts(none) == rollouts(some)


@pytest.mark.nightly
def test_rollout__reward_memory_gib(sample: Train) -> None:
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}  # prompt, which takes a GiB
    assert sample("hungry", reward_memory_gib=4, **one).series("reward") == [1.0]
    with pytest.raises(TrainingError, match=r"more than 0\.5 GiB of memory"):
        sample("hungry", reward_memory_gib=0.5, **one)


# ---- reward and distill


def test_post_training__center_rewards_coefficient(runs: Any) -> None:
    assert are_apart([runs(method="reward", center_rewards_coefficient=c, max_steps=1) for c in (0.0, 0.5)])


def test_post_training__teacher_model_id(runs: Any) -> None:
    distill = {**DISTILL, "dataset.train_file": str(runs.files["singles"])}
    own, other = (runs({**distill, "teacher_model_id": str(runs.files[name])}) for name in ("model", "other"))
    assert loss(own) == pytest.approx(0, abs=1e-6) and loss(other) > 1e-4, "a model is its own best pupil"


@pytest.mark.nightly
def test_post_training__distill_loss(runs: Any, sample: Train) -> None:
    keys = {"method": "distill", "epsilon": None, "teacher_model_id": str(runs.files["other"])}
    whole, sampled = (sample(**keys, distill_loss=name) for name in ("divergence", "policy_gradient"))
    assert whole.series("divergence")[0] > 0
    assert sampled.series("reverse_kl") == pytest.approx(sampled.series("loss"), rel=1e-5)
    assert [r["completion_ids"] for r in rollouts(whole)] == [r["completion_ids"] for r in rollouts(sampled)]


@pytest.mark.nightly
def test_post_training__temperature(runs: Any) -> None:
    distill = {
        **DISTILL,
        "dataset.train_file": str(runs.files["singles"]),
        "teacher_model_id": str(runs.files["other"]),
    }
    assert are_apart([runs({**distill, "post_training.temperature": t}) for t in (0.5, 1.0, 2.0)])


@pytest.mark.nightly
def test_post_training__mask_truncated_completions(runs: Any, sample: Train) -> None:
    cut = sample(max_completion_length=2, **{"post_training.mask_truncated_completions": True})
    assert not any(any(group["ended"]) for group in rollouts(cut)) and cut.series("grad_norm") == [0.0]
    assert sample(max_completion_length=2).series("grad_norm")[0] > 0
