"""Arithmetic: attention, fused layers, matrix products and the head. Floor 2.

attention          attention over shared-prefix rows: the registry of kernels, and the dense oracle
tiled_attention    the same by matrix products over tiles of queries
fused, elementwise  layers with fewer passes over memory
plain_layers       which linear layers can be fused
lora_products      products of linear layers with and without LoRA
matmul             one product, the way that is fastest here
product_rates      how fast each way is on this processor, measured once
logprobs           the head: hidden states -> log-probs, tile by tile
divergence         the head of two models: how far their distributions are apart, tile by tile
entropy            the head: the entropy of its distributions, tile by tile
head_sizes         sizes of these tiles
weight_copies       weights in 16 bits, copied once per step
quantised_weights  weights in 4 or 8 bits, dequantised for one product at a time
dropout            dropout of what adapters see
denormals          numbers too small for their format, taken for 0
"""
