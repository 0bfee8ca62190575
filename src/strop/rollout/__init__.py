"""Completions that the policy itself samples, with their rewards. Floor 4.

drawing    distributions to tokens
sampler    prompts to groups of completions
source     prompts to the groups of every step
"""
