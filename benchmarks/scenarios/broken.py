"""Runs that are broken on purpose, each with the finding that it must raise before all others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.scenarios import faults, rows
from benchmarks.scenarios.models import TinyModel
from benchmarks.scenarios.scenario import Scenario, rewarded

ROWS = (
    Scenario("chosen and rejected exchanged in training", "dpo", "splits-disagree", rows=rows.exchanged),
    Scenario("the same, with 60 validation rows", "dpo", "splits-disagree", rows=partial(rows.exchanged, num_held=60)),
    Scenario("labels exchanged in training", "kto", "rewards-together", rows=rows.exchanged),
    Scenario("chosen and rejected exchanged, without a reference", "orpo", "odds-idle", rows=rows.exchanged),
    Scenario("labels drawn at random", "dpo", "accuracy-half", {"training.learning_rate": 3e-4},
             rows=rows.exchanged_at_random),
    Scenario("every pair in both orders", "dpo", "contradictions", rows=rows.both_ways),
    Scenario("every pair in both orders, with other prompts", "dpo", "accuracy-falls", rows=rows.nearly_both_ways),
    Scenario("sides that differ behind the cut only", "dpo", "same-pairs", {"training.max_completion_length": 16},
             rows=rows.same_behind_the_cut),
    Scenario("all answers cut before their end", "dpo", "no-end-token", {"training.max_completion_length": 16},
             rows=rows.long_answers),
    Scenario("answers that a reward model does not see whole", "reward", "completions-cut",
             {"training.max_completion_length": 16}, rows=rows.long_answers),
    Scenario("validation rows that are trained on", "dpo", "leakage", rows=rows.leaked),
    Scenario("validation rows of another kind", "sft", "worse-than-start", rows=rows.told_apart_otherwise),
    Scenario("a few validation rows", "dpo", "eval-size", rows=partial(rows.healthy, num_held=20)),
    Scenario("half of the rows four times", "sft", "duplicates", rows=rows.four_times),
    Scenario("one answer to everything", "sft", "duplicates", rows=rows.one_row),
    Scenario("an answer of one word, again and again", "sft", "repetition",
             {"finetuning.sample_prompts": 8, "finetuning.sample_max_new_tokens": 16}, rows=rows.one_word),
    Scenario("a few rows that are unlike all others", "sft", "gradient-spikes",
             {"models.0.huggingface_id": TinyModel.TAUGHT, "training.num_epochs": 6, "training.learning_rate": 3e-3},
             rows=rows.few_unlike),
    Scenario("the chosen side is the longer one", "dpo", "length-bias", rows=rows.longer_is_chosen),
    Scenario("pairs that a shallow cue tells apart", "dpo", "saturated", {"training.learning_rate": 1e-4},
             rows=rows.told_apart),
    Scenario("one label only", "kto", "labels", rows=rows.one_side),
    Scenario("rows that are broken", "dpo", "rows-lost",
             {"dataset.on_error": "skip", "dataset.max_dropped_fraction": 1.0}, rows=rows.one_side_mostly),
    Scenario("a template that begins twice", "dpo", "double-bos", {"models.0.huggingface_id": TinyModel.TWICE},
             rows=rows.chats),
)  # fmt: skip
"""What is wrong with the rows."""

COURSE = (
    Scenario("a rate that rounding swallows", "dpo", "weights-unmoved", {"training.learning_rate": 1e-13}),
    Scenario("a rate far too low", "dpo", "rate-low", {"training.learning_rate": 1e-7}),
    Scenario("a rate far too low, sft", "sft", "sft-still", {"training.learning_rate": 1e-7}),
    Scenario("a rate far too high", "dpo", "rate-high", {"training.learning_rate": 0.5, "training.warmup_steps": 0}),
    Scenario("a rate far too high, sft", "sft", "rate-high", {"training.learning_rate": 2.0}),
    Scenario("a rate far too high, without a reference", "cpo", "chosen-falls",
             {"training.learning_rate": 5e-3, "post_training.cpo_alpha": 0.0}),
    Scenario("a warm-up that never begins", "dpo", "rate-zero", during=faults.rate_of_zero),
    Scenario("chosen answers that fall with the rejected ones", "dpo", "likelihood-displacement",
             {"training.learning_rate": 2e-3}),
    Scenario("a beta that holds nothing", "dpo", "drift",
             {"training.learning_rate": 5e-3, "post_training.beta": 0.01, "post_training.sft_weight": 1.0},
             rows=rows.told_apart),
    Scenario("other text that becomes less likely", "kto", "kl-zero",
             {"training.learning_rate": 9e-4, "training.per_device_train_batch_size": 16}),
    Scenario("a beta that is 0 in float32", "dpo", "gradient-zero", {"post_training.beta": 1e-42}),
    Scenario("the beta of dpo for simpo", "simpo", "simpo-beta", {"post_training.simpo_beta": 0.1}),
    Scenario("a limit of the gradient far too low", "dpo", "always-clipped", {"training.max_grad_norm": 1e-3}),
    Scenario("a run of ten steps", "dpo", "few-steps", {"training.max_steps": 10}),
    Scenario("few rows, many epochs", "sft", "risen",
             {"training.num_epochs": 30, "training.learning_rate": 1e-3, "training.eval_steps": 8},
             rows=partial(rows.healthy, num_train=96)),
    Scenario("numbers that are not finite", "dpo", "ended-by-error", {"training.learning_rate": 1e30}, fails=True),
    Scenario("steps that are skipped, since they are not finite", "dpo", "not-finite",
             {"training.learning_rate": 1e30, "training.on_nonfinite": "skip", "training.max_steps": 8,
              "dataset.val_file": None}),
)  # fmt: skip
"""Settings that spoil the course of a run."""

MODELS = (
    Scenario("another reference than the model at the start", "dpo", "reference-mismatch",
             {"post_training.ref_model_id": TinyModel.OTHER}, after=faults.says("ref_model_id", "null")),
    Scenario("another loss than the configuration says", "dpo", "first-loss",
             {"post_training.loss_type": "hinge"}, after=faults.says("loss_type", "sigmoid")),
    Scenario("weights that do not belong to the tokenizer", "sft", "first-likelihood",
             {"models.0.huggingface_id": TinyModel.OTHER}),
    Scenario("a teacher that is the student", "distill", "teacher-is-student",
             {"post_training.teacher_model_id": TinyModel.MODEL}),
)  # fmt: skip
"""A model or a loss that is not the one that was meant."""

SAMPLED = (
    Scenario("completions that are all cut", "grpo", "completions-clipped", {"training.max_completion_length": 4}),
    Scenario("completions that are all cut and left out", "grpo", "completions-clipped",
             {"training.max_completion_length": 4, "post_training.mask_truncated_completions": True}),
    Scenario("a reward that pays nothing", "grpo", "groups-without-signal", rewarded("nothing"),
             rows=rows.paid_otherwise),
    Scenario("a reward that pays for length", "grpo", "longer-not-better", rewarded("length"),
             rows=rows.paid_otherwise),
    Scenario("a reward that pays for length, at a low rate", "grpo", "length-rewarded",
             {**rewarded("length"), "training.learning_rate": 1e-5}, rows=rows.all_paid_otherwise),
    Scenario("a reward that pays for the wrong thing", "grpo", "reward-hacking", rewarded("second half"),
             rows=rows.paid_otherwise),
    Scenario("a reward that is won at the cost of another", "grpo", "one-reward-wins",
             {**rewarded("few words", "length", weights=(1.0, 0.05)), "post_training.algorithm": "dr_grpo",
              "training.num_epochs": 2, "training.learning_rate": 4e-3}, rows=rows.all_paid_otherwise),
    Scenario("an entropy bonus far too high", "grpo", "worse-grow-longer",
             {"post_training.entropy_coef": 0.3, "training.num_epochs": 2}),
    Scenario("a policy that becomes sure", "grpo", "entropy-collapse",
             {**rewarded("one word"), "training.learning_rate": 1.5e-2, "training.num_epochs": 3},
             rows=rows.all_paid_otherwise),
    Scenario("a policy far from its reference", "grpo", "kl-high",
             {"training.learning_rate": 2e-2, "training.num_epochs": 2, "post_training.beta": 1e-4}),
    Scenario("samples that are used too often", "grpo", "ratios-clipped",
             {"training.learning_rate": 1e-2, "rollout.num_iterations": 16, "training.max_steps": 96}),
    Scenario("samples that are used twice at a rate far too low", "grpo", "ratios-never-clipped",
             {"training.learning_rate": 1e-6, "rollout.num_iterations": 2}),
    Scenario("a sampler whose weights lag", "grpo", "sampler-mismatch",
             {"post_training.sampler_correction": "token_truncate"}, during=faults.sampler_lags),
    Scenario("a sampler that repeats an answer", "grpo", "forecast-exceeded", {"rollout.probe_prompts": 32},
             during=faults.sampler_repeats),
)  # fmt: skip
"""Runs that sample their completions."""

BROKEN = (*ROWS, *COURSE, *MODELS, *SAMPLED)

UNTRIED: Mapping[str, str] = {
    "rows": "it is never raised: it stands under what was not checked where data.json is missing",
}
"""Findings that no run here is broken for, with the reason."""
