"""The policy: from a model folder to log-probs of scored tokens. Floor 2.

model/             what a model is and how it is loaded: folder, tokenizer, adapters
kernels/           arithmetic: attention, fused layers, products, the head
load               tokenizer and model, for programs that use strop's parts
build              a model section -> a policy, in one order
policy             the module whose forward scores a batch
saving             what is left in `final/`
reference          the model that log-ratios are taken against
reference_store    its log-probs on disk
prefix_sharing     where prompts may be shared by their completions
probe              whether strop's way of scoring gives the model's own log-probs
precision          dtypes of computing and keeping
checkpointing      which layers compute their activations again
allocator          memory that need not be held, and running out of it
"""

from strop.terminal import take_over

take_over("peft", "bitsandbytes", "accelerate")  # before they are imported: some of them warn about parts they miss
