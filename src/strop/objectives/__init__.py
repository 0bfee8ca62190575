"""One file per method: its contract, its formula and its metrics. Floor 2.

base               the contract of an objective
pairs              what objectives on pairs share
sft, distill       completions, as they are
dpo, ipo, cpo, simpo, orpo, reward  pairs
kto                completions with a label
grpo               groups of sampled completions with rewards
advantages         rewards to advantages, over a whole step
truncated          completions that were cut off, left out of the loss
"""
