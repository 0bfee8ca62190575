"""A trained model in other forms: an adapter merged into its base, which is proven, and other layouts. Floor 6.

merge, merged_weights  `strop merge`: an adapter and its base as one model
proof              that two models are one: layers, logits and greedy texts side by side
convert            `strop convert`: from transformers' layout to Meta's, and back
layout, params_json  names of weights, and the configuration, in both layouts
consolidated       a folder in Meta's layout, as one model
converted_bases    models that are trained from such folders: converted once, into the cache
shards, pth        files of weights, read and written one tensor at a time
folders            what an export copies, and where it writes
"""
