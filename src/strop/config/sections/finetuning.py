"""The `finetuning` section of the configuration: resuming, the best model, when to stop. Floor 1, no torch."""

from __future__ import annotations

from pydantic import Field

from strop.config.section import ListOf, Section
from strop.config.stop_on import StopOn


class FinetuningSection(Section):
    """Resuming, the best model, early stopping."""

    resume_from_checkpoint: str | None = None
    """As `--resume`: `auto` (the newest complete checkpoint of the run folder) or the path of a checkpoint."""
    load_best_model_at_end: bool = True
    """The final model is the one with the best evaluation; needs validation rows."""
    metric_for_best_model: str = Field(
        default="eval_loss",
        pattern=r"^[A-Za-z]\w*(/\w+)*$",
        json_schema_extra={
            "x-type": "the name of a metric, such as eval_loss or eval_rewards/accuracies",
            "x-default": "eval_loss; eval_reward with rollout",
        },
    )
    """A metric of the evaluation, with or without the prefix `eval_`. Default: eval_loss; with rollout eval_reward."""
    greater_is_better: bool | None = Field(
        default=None, json_schema_extra={"x-default": "by metric (false for losses)"}
    )
    """null: false for losses (`loss`, `nll`, `perplexity`), true for everything else."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """Stop after so many evaluations in a row that were not better; null: never."""
    stop_on: ListOf[StopOn] = ()
    """Findings (docs/findings.md) that stop the run when one is `fail` or `warn`: with a checkpoint and exit code 3."""
