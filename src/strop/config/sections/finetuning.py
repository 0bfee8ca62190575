"""The `finetuning` section of the configuration: resuming, the best model, when to stop, samples. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from strop.config.base_section import ListOf, Problem, Section
from strop.config.stop_on import StopOn


class FinetuningSection(Section):
    """Resuming, the best model, early stopping, samples while training."""

    resume_from_checkpoint: str | None = None
    """As `--resume`: `auto` (the newest complete checkpoint of the run folder) or the path of a checkpoint."""
    load_best_model_at_end: bool = True
    """The final model is the one with the best evaluation; needs validation rows."""
    metric_for_best_model: str = Field(
        default="eval_loss",
        pattern=r"^[A-Za-z]\w*(/\S+)?$",  # rewards are named by files and functions: rewards/own.py:right/mean
        json_schema_extra={
            "x-type": "the name of a metric, such as eval_loss or eval_rewards/accuracies",
            "x-default": "eval_loss; eval_reward with rollout, but for distill",
        },
    )
    """A metric of the evaluation, with or without the prefix `eval_`. Default: eval_loss; with rollout
    eval_reward, but for distill."""
    greater_is_better: bool | None = Field(
        default=None, json_schema_extra={"x-default": "by metric (false for losses)"}
    )
    """null: false for losses and their terms (`loss`, `loss/preference`, `nll`, `perplexity`, `divergence`,
    `reverse_kl`), true for everything else."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """Stop after this many evaluations in a row that were not better; null: never."""
    stop_on: ListOf[StopOn] = ()
    """Findings (docs/findings.md) that stop the run when one is `fail` or `warn`: with a checkpoint and exit code 3."""
    sample_prompts: int | str | None = Field(
        default=None, json_schema_extra={"x-type": "a number above 0, or a file as strop generate --prompts reads it"}
    )
    """Answer these prompts before the first step, at every evaluation and at the end: a file of prompts, or this many
    of the first validation rows. The answers go to samples.jsonl and the trackers; training is the same without."""
    sample_max_new_tokens: int = Field(default=128, gt=0)
    """Tokens of such an answer at most."""
    score_samples: str | None = None
    """A function that scores these answers, as `module:function` or `file.py:function`, in the form of a reward.
    Evaluations then have `samples/score` and `samples/win_rate`, the share of answers that beat those of the start."""

    def problems(self) -> Iterator[Problem]:
        if isinstance(self.sample_prompts, int) and self.sample_prompts < 1:
            yield Problem(
                ("sample_prompts",),
                f"sample_prompts is {self.sample_prompts}",
                "a number above 0, or a file of prompts",
            )
        if self.score_samples is not None and self.sample_prompts is None:
            yield Problem(
                ("score_samples", "sample_prompts"),
                "score_samples is given, and there are no samples to score",
                fix="set sample_prompts, or remove score_samples",
            )
