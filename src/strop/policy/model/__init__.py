"""What a model is and how it is loaded, before anything is scored. Floor 2.

folder, folder_safety   what a model folder holds, and what it may not do
consolidated_files  models in the layout that Meta publishes Llama in
configuration      config.json -> the configuration class of its architecture
tokenizer          a model section -> its tokenizer, or one clear message
load               a model section -> the model, or one clear message
weight_reading     its weights out of the files: all at once, quantised one by one, or later
deferred_weights   weights that stay in the files until each process reads its own rows
added_tokens       new tokens, and rows for them
task, adapter_base  whether it writes or judges; a saved adapter and the base it belongs to
shard_writer       a safetensors file, written one tensor at a time
tokenizer_patterns  regular expressions of a tokenizer, compiled under a time limit
end_tokens         where an answer ends: generation settings, in and out
shape_check        a model without weights, held against the headers of its files
from_config        sizes of a model from its configuration alone
quantisation_settings   how many bits the section asks for, or the files have
quantised_base     bases in 4 or 8 bits
adapter_init       how new adapters begin
adapters           LoRA adapters: new ones, and continuing old ones
adapter_files      the weights of a saved adapter, and whether a model is their base
adapter_settings   what adapter_config.json says, and whether such an adapter can be used here
adapter_targets    which layers get adapters, and how much of the model they reach
random_parts       what a model draws at random while it trains, switched off
logit_transform    what a model does between its head and the softmax
model_hashes       hashes of weights and configuration
"""
