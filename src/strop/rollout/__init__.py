"""Completions that the policy itself samples, with their rewards. Floor 4.

drawing    distributions to tokens
sampler    prompts to groups of completions
scoring    completions to rewards
source     prompts to the groups of every step
build      the source of a run, from its configuration
"""
