"""The training loop and what belongs to it: step, optimizer, evaluation, checkpoints and metrics. Floor 3."""
