"""The sections of the configuration other than `post_training`. Floor 1, no torch.

Every field says its unit and range; the reference page of the documentation and the JSON Schema are made from here.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from strop.config.section import ListOf, Section


class ModelSection(Section):
    """One model to train."""

    name: str = Field(default="", pattern=r"^[^/\\\x00]*$")
    """Name of the run's folder under `training.output_dir`; default: the last part of `huggingface_id`."""
    huggingface_id: str = Field(min_length=1)
    """Hub id, or a folder with the model and its tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read it."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    adapter: str | None = None
    """Hub id or folder of a LoRA adapter to continue from; the model with it is also the reference."""
    attn_implementation: str | None = None
    """Null: shared-prefix attention where the architecture allows it. A name that transformers knows (`sdpa`,
    `eager`, ...): that attention, on plain padded rows."""

    @model_validator(mode="before")
    @classmethod
    def _name_from_id(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and isinstance(data.get("huggingface_id"), str):
            return {**data, "name": data["huggingface_id"].rstrip("/").split("/")[-1]}
        return data

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Self:
        if self.name in ("", ".", ".."):
            raise ValueError(f"name: {self.name!r} cannot be the name of a folder")
        return self


class DatasetSection(Section):
    """Where the rows come from and how they become tokens."""

    name: str | None = None
    """Hub data set, `save_to_disk` folder, or a .jsonl, .json, .csv or .parquet file."""
    subset: str | None = None
    """Hub configuration of the data set. (A slice belongs in `split`.)"""
    split: str = "train"
    """Split to train on, for hub data sets and folders; slices such as `train[:10%]` work."""
    train_file: str | None = None
    """Training rows; wins over `splits_dir` and `name`."""
    val_file: str | None = None
    """Validation rows; wins over `splits_dir` and `validation_split`."""
    splits_dir: str | None = None
    """Folder with `train.jsonl` and `val.jsonl` (sft) or `train.dpo.jsonl` and `val.dpo.jsonl` (preferences)."""
    prompt_column: str = "prompt"
    """Column with the prompt (text or a list of messages)."""
    chosen_column: str = "chosen"
    """Column with the preferred completion."""
    rejected_column: str = "rejected"
    """Column with the other completion."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first rows of the training data, validation split included; null: all."""
    validation_split: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows held out for evaluation where no validation source is given; 0: none."""
    render: Literal["auto", "chat", "raw"] = "auto"
    """Text rows: `chat` wraps them by the chat template, `raw` does not, `auto`: chat where the tokenizer has one."""
    on_error: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop with its file and line, or skip it, count it and write it to rejected.jsonl."""
    filter_overlength_samples: bool = False
    """Drop rows that are longer than the limits instead of truncating them."""


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685). The section's presence switches them on."""

    enabled: bool = False
    """Train adapters instead of all weights; true when a `lora` section is given, else false."""
    r: int = Field(default=16, gt=0)
    """Rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """Scale: the adapter's output is multiplied by lora_alpha / r. Default 2 r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    target_modules: ListOf[str] | str = "auto"
    """Module names; `auto`: by the model's family; `all-linear`: every linear layer but the head."""
    modules_to_save: ListOf[str] | None = None
    """Modules that are trained in full and saved with the adapter."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Kind of model; strop tunes causal language models."""
    use_rslora: bool = False
    """Rank-stabilised scale lora_alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_from_rank(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("lora_alpha") is None and isinstance(data.get("r"), int):
            return {**data, "lora_alpha": 2 * data["r"]}
        return data


class TrainingSection(Section):
    """The recipe of the run."""

    output_dir: str = "./outputs"
    """Run folders are made here, one a model: {output_dir}/{model name}/."""
    num_epochs: int = Field(default=1, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps; wins over num_epochs; null: by num_epochs."""
    per_device_train_batch_size: int = Field(default=2, gt=0)
    """Groups (rows) a device takes at once; lowering it lowers memory."""
    per_device_eval_batch_size: int = Field(default=2, gt=0)
    """The same in evaluations."""
    gradient_accumulation_steps: int = Field(default=8, gt=0)
    """Effective batch = per_device_train_batch_size x gradient_accumulation_steps x number of devices."""
    groups_per_step: int | None = Field(default=None, gt=0)
    """Groups of one optimizer step; null: the effective batch at the first launch. A resume keeps it."""
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    """Tokens of one micro-batch; null: per_device_train_batch_size x the longest group. Changes memory and speed,
    never the result."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: by method (sft 2e-5, dpo 5e-7)."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, to 0 at the last step; constant does not decay."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; null: warmup_ratio, else 100."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Warm-up as a share of all steps; not together with warmup_steps."""
    max_seq_length: int = Field(default=512, gt=1)
    """Tokens of a prompt and one completion together, at most."""
    max_prompt_length: int | None = Field(default=256, gt=0)
    """Tokens of a prompt, cut at the left by whole messages first; null: max_seq_length alone decides."""
    max_completion_length: int | None = Field(default=256, gt=0)
    """Tokens of a completion, cut at the right; null: max_seq_length alone decides."""
    logging_steps: int = Field(default=10, gt=0)
    """Write metrics every so many steps."""
    save_steps: int = Field(default=500, gt=0)
    """Write a checkpoint every so many steps."""
    eval_steps: int = Field(default=500, gt=0)
    """Evaluate every so many steps; also before the first step and after the last."""
    save_total_limit: int | None = Field(default=3, gt=0)
    """Checkpoints to keep besides the best one; null: all."""
    fp16: bool | None = None
    """Compute in float16 with a gradient scaler; weights that train stay in float32."""
    bf16: bool | None = None
    """Compute in bfloat16; weights that train stay in float32."""
    auto_precision: bool = False
    """bf16 where the device supports it and neither bf16 nor fp16 is given."""
    fp32_logits: bool = False
    """Compute logits in float32 whatever the precision of the rest."""
    gradient_checkpointing: bool | float = False
    """Recompute activations in the backward pass: true, false, or the share of layers in (0, 1)."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """Optimizer; the 8-bit ones need the extra `bnb`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient to this norm; null: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinity in loss or gradient: stop before the update, or skip it, counted, at most 10 in a row."""
    mount_dir: str | None = None
    """The final model and the logs are also copied to {mount_dir}/{model name}/ when the run ends."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; choose one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio are both given; choose one")
        ratio = self.gradient_checkpointing
        if not isinstance(ratio, bool) and not 0 < ratio < 1:
            raise ValueError(f"gradient_checkpointing: {ratio} is neither true, false nor a share in (0, 1)")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_seq_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} leaves no token for a completion within "
                f"max_seq_length {self.max_seq_length}; lower it or raise max_seq_length"
            )
        return self


class GpuSection(Section):
    """Devices."""

    device_ids: ListOf[int] | None = None
    """GPUs to use; null: the first one, or the CPU where there is none."""
    use_ddp: bool = False
    """Data parallelism over several device_ids."""


class FinetuningSection(Section):
    """Resuming, the best model, early stopping."""

    resume_from_checkpoint: str | None = None
    """`auto` (the newest complete checkpoint of the run folder) or the path of a checkpoint."""
    load_best_model_at_end: bool = True
    """The final model is the one with the best evaluation; needs validation rows."""
    metric_for_best_model: str = "eval_loss"
    """A metric of the evaluation, with or without the prefix `eval_`."""
    greater_is_better: bool | None = None
    """null: false for losses, true for everything else."""
    early_stopping_patience: int | None = Field(default=3, gt=0)
    """Stop after so many evaluations in a row that were not better; null: never."""


class LoggingSection(Section):
    """What is written down besides metrics.jsonl."""

    report_to: ListOf[Literal["tensorboard"]] = ()
    """Trackers."""
    logging_dir: str = "./logs"
    """Folder of trackers and margins; relative to the run folder."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the terminal says."""
    margins: bool = True
    """Write every step's margins to {logging_dir}/margins (methods with a margin)."""
