"""The plan of a run, on lengths alone: which groups make a step, and how a step is cut. Floor 2.

order      which groups make which optimizer step
filling    `training.packing`: rows filled with groups
tokens     what rows cost in tokens
budget     tokens of a micro-batch, where nobody says
cutting    steps into micro-batches
work       the micro-batches of a whole epoch in numbers
"""
