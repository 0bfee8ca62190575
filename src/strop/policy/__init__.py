"""The policy: from a model folder to log-probs of scored tokens. Floor 2.

model/             loading a model: folder, configuration, tokenizer, adapters
kernels/           the arithmetic: attention, fused layers, matrix products, the head
load               tokenizer and model under one name, for programs outside of strop that use its parts
build              builds a policy from a model section, in one fixed order
policy             the module whose forward pass scores a batch
saving             writes `final/`
group_logps        log-probs of groups under a policy
reference_models   references whose weights are kept beside the policy's
other_models       loads the models beside the policy: that of `ref_model_id`, the teacher
teacher            the teacher in a forward pass
strategy, sharding  how weights lie over processes: whole in each, or sharded by torch's FSDP
gradient_norm      the norm of all gradients, by which they are clipped
reference_store    reference log-probs on disk
prefix_sharing     which models may share a prompt among its completions
probe              checks at load that strop computes the log-probs that the model itself computes
precision          the dtypes in which weights are stored and products computed
gradient_checkpointing   which layers recompute their activations in the backward pass
memory_attempts    how running out of memory is recognised and survived
"""

from strop.terminal import take_over

take_over(
    "peft", "bitsandbytes", "torchao", "accelerate"
)  # before they are imported: some of them warn about parts they miss
