"""The `training` section of the configuration: batch, optimizer, limits, precision, memory. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from strop.config.base_section import Problem, Section
from strop.config.unsafe_folders import unsafe_folder

LEARNING_RATES = "by method (sft 2e-5, preferences 5e-7, grpo 1e-6; ten times that for adapters)"
"""How `training.learning_rate` is chosen where nobody gives it."""


def _half_of_max_seq_length(data: dict[str, Any]) -> int:
    return int(data.get("max_seq_length", 512)) // 2


class TrainingSection(Section):
    """The recipe of the run."""

    output_dir: str = "./outputs"
    """Run folders are made here, one per model: {output_dir}/{model name}/."""
    num_epochs: int = Field(default=1, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps; wins over num_epochs; null: by num_epochs."""
    per_device_train_batch_size: int = Field(default=2, gt=0)
    """Groups (rows) a device takes at once: a micro-batch has at most this many times the tokens of the longest one."""
    per_device_eval_batch_size: int = Field(default=2, gt=0)
    """The same in evaluations."""
    gradient_accumulation_steps: int = Field(default=8, gt=0)
    """Effective batch = per_device_train_batch_size x gradient_accumulation_steps x number of devices."""
    packing: bool = False
    """The batch size counts rows filled to max_seq_length instead of examples; attention never crosses examples. sft
    only."""
    groups_per_step: int | None = Field(default=None, gt=0)
    """Groups (under packing, filled rows) of one optimizer step; null: the effective batch at the first launch. A
    resume keeps it."""
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    """Tokens of one micro-batch; null: 2048 on a CPU, or the longest group (under packing max_seq_length); on a GPU
    per_device_train_batch_size x that; halved until the estimate of memory fits the device. Changes memory and
    speed; the result only through the masks of lora_dropout, where a resume keeps it."""
    learning_rate: float | None = Field(default=None, gt=0, json_schema_extra={"x-default": LEARNING_RATES})
    """Peak learning rate; null: by method and by what trains (all weights: sft 2e-5, preferences 5e-7, grpo 1e-6;
    adapters: ten times that)."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, towards 0, which it would reach one step after the last; constant does not decay."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; null: by warmup_ratio."""
    warmup_ratio: float | None = Field(
        default=None, ge=0, le=1, json_schema_extra={"x-default": "0.1 unless warmup_steps is given"}
    )
    """Warm-up as a share of all steps, rounded up; not together with warmup_steps. null: 0.1 unless warmup_steps is
    given."""
    max_seq_length: int = Field(default=512, gt=1)
    """Tokens of a prompt and one completion together, at most."""
    max_prompt_length: int | None = Field(
        default_factory=_half_of_max_seq_length, gt=0, json_schema_extra={"x-default": "half of max_seq_length"}
    )
    """Tokens of a prompt, cut at the left by whole messages first; null: max_seq_length alone decides. Default: half
    of max_seq_length."""
    max_completion_length: int | None = Field(
        default_factory=_half_of_max_seq_length,
        gt=0,
        json_schema_extra={"x-default": "half of max_seq_length; null for sft"},
    )
    """Tokens of a completion, cut at the right; null: max_seq_length alone decides. Default: half of max_seq_length;
    for sft null, since there everything after the first prompt is the completion."""
    logging_steps: int = Field(default=10, gt=0)
    """Write metrics every this many steps."""
    save_steps: int = Field(default=500, gt=0)
    """Write a checkpoint every this many steps."""
    eval_steps: int = Field(default=500, gt=0)
    """Evaluate every this many steps, and after the last."""
    eval_at_start: bool = True
    """Evaluate before the first step too, where there are validation rows: what the end is compared with."""
    save_total_limit: int | None = Field(default=3, gt=0)
    """Checkpoints to keep besides the best one; null: all."""
    async_save: bool = False
    """Write checkpoints beside the training: a save copies what the checkpoint holds to host memory, and the run goes
    on while it is written. The copy stays in host memory. The checkpoint of a stop and the last one are waited for."""
    fp16: bool | None = None
    """Compute in float16 with a gradient scaler; weights that train stay in float32."""
    bf16: bool | None = None
    """Compute in bfloat16; weights that train stay in float32."""
    auto_precision: bool = False
    """bf16 where neither bf16 nor fp16 is given and it is faster: on a GPU that has it, on a CPU as measured."""
    fp32_logits: bool = False
    """Compute logits in float32 whatever the precision of the rest."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the weights of `final/` after full training; auto: the base model's own, as its files have it. Adapters
    are saved in float32."""
    torch_compile: bool = False
    """Compile what norms and MLPs do element by element, in a run's first seconds; on a CPU no gain was measured."""
    gradient_checkpointing: bool | float | Literal["auto"] = Field(
        default="auto", json_schema_extra={"x-type": "true, false, auto, or a number above 0 and below 1"}
    )
    """Recompute activations in the backward pass: true, false, the share of layers in (0, 1), or auto: the smallest
    share with which the estimate of memory fits the device, false where there is no estimate, and all layers from the
    step on at which a single group does not fit."""
    reference_store: bool = True
    """Keep reference log-probs in the cache folder, where other runs with the same model and rows find them."""
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adamw_8bit",
        "ademamix",
        "ademamix_8bit",
        "lion_8bit",
        "lion_32bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
    ] = "adamw_torch_fused"
    """Optimizer, by the names of transformers; those of bitsandbytes (ending in `bit`, and `ademamix`, arXiv
    2409.03137) need the extra `bnb`. `sgd` has no momentum. The default learning rates are AdamW's: Lion (arXiv
    2302.06675) takes about a fifth of them, and sgd far more. Paged ones may move their state out of a GPU's memory; on
    a CPU they are as the others."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (of `sgd`: added to the gradient); norms and biases are exempt."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient to this norm; null: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinity in loss or gradient: stop before the update, or skip it, counted, at most 10 in a row."""
    mount_dir: str | None = None
    """The final model and the logs are also copied to {mount_dir}/{model name}/ when the run ends."""
    push_to_hub: bool = False
    """Upload the final model and its card to a hub when the run ends, by the login of huggingface_hub. A failed upload
    ends no run; a warning gives the command that uploads it later (`strop push`)."""
    hub_model_id: str | None = Field(
        default=None, min_length=1, json_schema_extra={"x-type": "OWNER/NAME, or NAME", "x-default": "the model's name"}
    )
    """The repository of push_to_hub, made where it is not there; null: the model's `name`, in the account that is
    logged in."""
    hub_private_repo: bool = True
    """Whether a repository that push_to_hub makes is private."""

    @property
    def recomputed(self) -> float:
        """The share of layers that compute their activations again; 0 while auto has not been decided."""
        share = self.gradient_checkpointing
        return 0.0 if share == "auto" else float(share)

    def problems(self) -> Iterator[Problem]:
        if self.bf16 and self.fp16:
            yield Problem(("bf16", "fp16"), "bf16 and fp16 are both true", "at most one of them", "remove one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            yield Problem(
                ("warmup_ratio", "warmup_steps"), "warmup_ratio and warmup_steps are both given", fix="remove one"
            )
        share = self.gradient_checkpointing
        if not isinstance(share, bool | str) and not 0 < share < 1:
            yield Problem(
                ("gradient_checkpointing",),
                f"gradient_checkpointing is {share}",
                "true, false, auto, or a share of the layers above 0 and below 1",
            )
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_seq_length:
            yield Problem(
                ("max_prompt_length", "max_seq_length"),
                f"max_prompt_length {self.max_prompt_length} leaves no token for a completion within max_seq_length "
                f"{self.max_seq_length}",
                fix="lower max_prompt_length or raise max_seq_length",
            )
        if not self.push_to_hub:
            for key in ("hub_model_id", "hub_private_repo"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield Problem(
                        (key, "push_to_hub"),
                        f"{key} is {getattr(self, key)}, and nothing is uploaded",
                        fix=f"set push_to_hub: true, or remove {key}",
                    )
        yield from unsafe_folder("output_dir", self.output_dir)
        if self.mount_dir is not None:
            yield from unsafe_folder("mount_dir", self.mount_dir)
