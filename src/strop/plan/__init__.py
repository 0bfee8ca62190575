"""The plan of a run, which needs only the lengths of groups: what makes a step, and how a step is cut. Floor 2.

order      which groups make which optimizer step
packing    `training.packing`: rows filled with groups
row_tokens  how many tokens groups take in each row layout
micro_batch_size   the default size of a micro-batch
dealing    which groups of a step each process takes
cutting    cuts steps into micro-batches
work       counts over the micro-batches of an epoch, from which memory and time are predicted
"""
