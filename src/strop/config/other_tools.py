"""Names of other tools: what strop calls it, or what to use where strop does not have it. Floor 1, no torch.

In: a key, a flag, a command, a method or a value that strop does not know. Out: the words of a message. `strop import`
reads the files of other tools by the same names. What is absent
here is answered as absent, not with the key that is spelled most like it.
"""

from __future__ import annotations

from collections.abc import Mapping

_MANY: Mapping[str, str] = {
    "models.N.huggingface_id": (
        "ckpt_paths policy_name model_path model_id pretrained_model_name_or_path models.path models.id"
    ),
    "dataset.train_file": (
        "dataset.path dataset.file datasets dataset_path dataset_file data_path data_file data_files train_path "
        "train_files train_data train_data_path train_dataset train_dataset_path training_file"
    ),
    "dataset.val_file": (
        "val_path val_files val_data val_dataset val_dataset_path valid_file validation_file validation_path "
        "validation_data validation_dataset dev_file eval_file eval_files eval_path eval_data eval_data_path "
        "eval_dataset eval_dataset_path test_file test_files test_path test_dataset test_datasets"
    ),
    "dataset.sources": "train_data_paths",
    "dataset.splits_dir": "dataset_dir",
    "dataset.prompt_column": "prompt_key prompt_field field_prompt",
    "dataset.chosen_column": "chosen_key chosen_field field_chosen",
    "dataset.rejected_column": "rejected_key rejected_field field_rejected",
    "post_training.method": "stage rl rlhf_type trainer_type",
}
"""What strop calls a key -> what others call it, where they have many names."""

RENAMED: Mapping[str, str] = {
    **{name: key for key, names in _MANY.items() for name in names.split()},
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "ckpt_paths": "models.N.huggingface_id",
    "num_train_epochs": "training.num_epochs",
    "n_epochs": "training.num_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "per_device_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "gradient_accum_steps": "training.gradient_accumulation_steps",
    "grad_accum": "training.gradient_accumulation_steps",
    "lr_scheduler_type": "training.lr_scheduler",
    "scheduler": "training.lr_scheduler",
    "optimizer": "training.optim",
    "wd": "training.weight_decay",
    "max_length": "training.max_seq_length",
    "max_len": "training.max_seq_length",
    "max_seq_len": "training.max_seq_length",
    "cutoff_len": "training.max_seq_length",
    "sequence_len": "training.max_seq_length",
    "evaluation_strategy": "training.eval_steps",
    "eval_strategy": "training.eval_steps",
    "save_strategy": "training.save_steps",
    "logging_strategy": "training.logging_steps",
    "model": "models.N.huggingface_id",
    "model_name": "models.N.huggingface_id",
    "model_name_or_path": "models.N.huggingface_id",
    "base_model": "models.N.huggingface_id",
    "adapter_name_or_path": "models.N.adapter",
    "adapter_path": "models.N.adapter",
    "attn_impl": "models.N.attn_implementation",
    "load_in_4bit": "models.N.quant",
    "load_in_8bit": "models.N.quant",
    "quantization_bit": "models.N.quant",
    "bits": "models.N.quant",
    "bnb_4bit_quant_type": "models.N.bnb_quant_type",
    "bnb_4bit_compute_dtype": "models.N.bnb_compute_dtype",
    "bnb_4bit_use_double_quant": "models.N.bnb_double_quant",
    "use_double_quant": "models.N.bnb_double_quant",
    "dataset_name": "dataset.name",
    "dataset_id": "dataset.name",
    "hf_dataset": "dataset.name",
    "val_split": "dataset.validation_split",
    "test_size": "dataset.validation_split",
    "eval_size": "dataset.validation_split",
    "max_train_samples": "dataset.max_samples",
    "num_train_samples": "dataset.max_samples",
    "dataset_num_proc": "dataset.num_workers",
    "val_size": "dataset.validation_split",
    "val_set_size": "dataset.validation_split",
    "chat_template": "dataset.template",
    "enable_thinking": "dataset.chat_template_kwargs",
    "template_kwargs": "dataset.chat_template_kwargs",
    "apply_chat_template_kwargs": "dataset.chat_template_kwargs",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_task_type": "lora.task_type",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "finetuning_type": "lora.enabled",
    "train_type": "lora.enabled",
    "tuner_type": "lora.enabled",
    "use_lora": "lora.enabled",
    "use_peft": "lora.enabled",
    "dpo_beta": "post_training.beta",
    "pref_beta": "post_training.beta",
    "pref_loss": "post_training.loss_type",
    "ref_name": "post_training.ref_model_id",
    "ref_model": "post_training.ref_model_id",
    "sync_ref_model": "post_training.ref_sync_steps",
    "ref_model_sync_steps": "post_training.ref_sync_steps",
    "ref_model_mixup_alpha": "post_training.ref_mixup_alpha",
    "use_weighting": "post_training.wpo_weighting",
    "rpo_alpha": "post_training.sft_weight",
    "f_divergence_type": "post_training.f_divergence",
    "f_alpha_divergence_coef": "post_training.f_alpha",
    "sample_packing": "training.packing",
    "reward_funcs": "rewards",
    "reward_functions": "rewards",
    "reward_weights": "rewards",
    "use_rollout": "rollout.enabled",
    "num_samples_per_prompt": "rollout.num_generations",
    "n_samples_per_prompt": "rollout.num_generations",
    "seed_everything": "seed",
    "use_wandb": "logging.report_to",
    "use_mlflow": "logging.report_to",
    "use_trackio": "logging.report_to",
    "log_with": "logging.report_to",
    "wandb_name": "logging.run_name",
    "wandb_run_name": "logging.run_name",
    "dataloader_num_workers": "dataset.num_workers",
    "preprocessing_num_workers": "dataset.num_workers",
    "gradient_clipping": "training.max_grad_norm",
    "warmup_proportion": "training.warmup_ratio",
    "dataset_config": "dataset.subset",
    "dataset_train_split": "dataset.split",
    "dataset_streaming": "dataset.streaming",
    "dataset_processes": "dataset.num_workers",
    "test_split_size": "dataset.validation_split",
    "chat_template_path": "dataset.template",
    "chat_template_jinja": "dataset.template",
    "model_revision": "models.N.revision",
    "revision_of_model": "models.N.revision",
    "lora_model_dir": "models.N.adapter",
    "pretrained_lora": "models.N.adapter",
    "quantization_type": "models.N.bnb_quant_type",
    "double_quantization": "models.N.bnb_double_quant",
    "use_bnb_nested_quant": "models.N.bnb_double_quant",
    "lora_target_parameters": "lora.target_parameters",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "lora_target_linear": "lora.target_modules",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "rl_beta": "post_training.beta",
    "orpo_alpha": "post_training.beta",
    "pref_ftx": "post_training.sft_weight",
    "dpo_label_smoothing": "post_training.label_smoothing",
    "dpo_use_weighting": "post_training.wpo_weighting",
    "kto_chosen_weight": "post_training.desirable_weight",
    "kto_desirable_weight": "post_training.desirable_weight",
    "kto_rejected_weight": "post_training.undesirable_weight",
    "kto_undesirable_weight": "post_training.undesirable_weight",
    "scale_rewards": "post_training.advantage",
    "eval_on_start": "training.eval_at_start",
    "sequence_packing": "training.packing",
    "upcast_lmhead_output": "training.fp32_logits",
    "torchdynamo": "training.torch_compile",
}
"""What other tools call a key: known to the hints of error messages, not to the schema. A name with a section in front
means this only there."""

_KERNELS = "attention kernels and fused layers are chosen by device, and nothing is to be set for them"
_PADDING = "nothing is padded and padding is never trained, so there is nothing to set"
_GROUPS: Mapping[str, str] = {
    "models[].quant: 4bit or 8bit (--quant 4bit) quantises the base under adapters, by bitsandbytes": (
        "quantize quantise quantization quantization_config qlora gptq awq nf4 fp8"
    ),
    "gpu.device_ids, or torchrun, starts one process per device; gpu.fsdp: true shards the model over them; lora, "
    "training.micro_batch_tokens and training.gradient_checkpointing make it fit": (
        "deepspeed deepspeed_config ds_config zero_stage fsdp_config accelerate ddp_timeout "
        "ddp_find_unused_parameters tensor_parallel_size pipeline_parallel_size context_parallel_size "
        "sequence_parallel_size num_gpus nproc_per_node device_map local_rank"
    ),
    "numbers go to metrics.jsonl of the run folder, and to the trackers that logging.report_to names: tensorboard, "
    "wandb, mlflow, trackio": "comet_ml comet swanlab use_swanlab neptune plot_loss dvclive clearml aim",
    "W&B takes it from its own variables of the environment (WANDB_ENTITY, WANDB_MODE, ...); --resume goes on with the "
    "run that it began": "wandb_entity wandb_mode wandb_run_id wandb_watch wandb_log_model",
    "method: grpo with a rollout section trains answers that functions or a reward model reward; dpo trains on pairs "
    "of answers, kto on answers marked as good or bad": ("ppo online_dpo nash_md xpo rlhf gkd"),
    'post_training.method: reward trains a reward model on pairs; rewards: ["model:ID"] with grpo trains against one': (
        "reward_model reward_modeling rm prm"
    ),
    "it is an algorithm of grpo: set post_training.method: grpo and post_training.algorithm to grpo, dr_grpo, dapo, "
    "bnpo, gspo, cispo, sapo, gmpo, rloo, reinforce++, maxrl or gdpo": (
        "dr_grpo dapo bnpo gspo cispo sapo gmpo rloo reinforce reinforce++ reinforce_plus_plus maxrl gdpo"
    ),
    "strop merge RUN --output-dir DIR merges an adapter into its base": (
        "merge_adapter merge_lora merge_and_unload save_merged"
    ),
    "strop generate RUN answers a prompt, a file of prompts, or you": (
        "chat infer inference predict predict_with_generate sample complete"
    ),
    "final/ is a model as transformers loads it: docs/using-your-model.md shows how to serve it": (
        "serve api webui webchat vllm deploy"
    ),
    "rollout.sampler: vllm has a server that was started with `vllm serve` draw the completions": (
        "use_vllm vllm_mode vllm_server_host vllm_server_port vllm_server_base_url"
    ),
    "strop eval MODEL --data FILE evaluates a model; training.eval_steps does while it trains, on dataset.val_file or "
    "dataset.validation_split": ("evaluate evaluation test bench benchmark lm_eval lm_eval_harness do_eval"),
    "final/ holds safetensors and a tokenizer as transformers writes them; tools of other formats start from it": (
        "export gguf ggml onnx mlx export_dir save_method"
    ),
    "strop push RUN --repo OWNER/NAME uploads the finished model of a run": (
        "upload publish hub_token hub_strategy hub_always_push hub_revision"
    ),
    _KERNELS: (
        "flash_attn flash_attention use_flash_attention_2 flash_attn_2 sdp_attention xformers_attention xformers "
        "unsloth use_unsloth liger_kernel use_liger use_liger_kernel enable_liger_kernel"
    ),
    _PADDING: (
        "group_by_length length_column_name padding_free pad_to_multiple_of pad_to_sequence_len padding "
        "padding_side neat_packing pad_token label_pad_token_id data_collator"
    ),
    "completions are trained and prompts are not, always: rows of text alone are trained as a whole": (
        "completion_only_loss assistant_only_loss train_on_inputs train_on_prompt mask_prompt mask_history "
        "train_on_completions_only response_template train_on_responses_only"
    ),
    "weights that train are float32; training.bf16 or training.fp16 computes in 16 bits": (
        "torch_dtype dtype precision pure_bf16 tf32 mixed_precision"
    ),
    "there is no NEFTune noise; lora.lora_dropout and training.weight_decay are there": ("neftune_noise_alpha"),
    "strop prepare --input FILE --method NAME makes split files; strop train tokenises rows itself": (
        "preprocess tokenize prepare_data process"
    ),
    "strop train --config FILE --dry-run validates a configuration and its rows, and shows an example": (
        "check validate inspect dry_run estimate lint"
    ),
    "strop train --config FILE trains": ("do_train run fit finetune fine_tune tune start launch"),
    "strop train --config FILE --overwrite starts anew in the folder of another run": (
        "overwrite_output_dir overwrite_cache force"
    ),
    "strop train --config FILE --resume goes on with a run": ("resume continue restart"),
}
"""What to use instead -> the names that ask for it, one behind the other."""

ABSENT: Mapping[str, str] = {name: instead for instead, names in _GROUPS.items() for name in names.split()}
"""A name -> what to use instead, for what strop does not have."""

NEEDLESS = frozenset({_KERNELS, _PADDING})
"""What is said of names that strop does not have because it needs none: without them a run is the same."""


def key_of(name: str) -> str:
    """The dotted key of strop that a name of another tool means, where its values mean the same as well.

    Raises:
        KeyError: there is none.
    """
    from strop.config.schema import KEYS

    found = RENAMED.get(name) or next(key.dotted for key in KEYS if key.name == name)
    return found.replace(".N.", ".0.")


def instead_of(name: str) -> str:
    """What to use instead of a key, flag, command, method or value that strop does not have; "" where it is not known
    from elsewhere."""
    return ABSENT.get(name.lower().lstrip("-").replace("-", "_"), "")
