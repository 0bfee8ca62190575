"""Completions that the policy itself samples, with their rewards. Floor 4.

drawing    distributions to tokens
stop_texts  texts that end a completion
sampler    prompts to groups of completions
vllm_client    a vLLM server, over HTTP
vllm_sampler   prompts to groups of completions, drawn by a vLLM server
rewarding  completions to rewards
reward_model   a model as a reward
pairs      completions with rewards to pairs
comparing  how the completions of a group compare, in numbers
collect    prompts to groups with rewards and log-probs, shared among processes
held_out   how good the policy is at prompts that it does not train on
forecast   how many groups will teach nothing, before the first step
drawn_ahead      steps that are drawn while earlier ones train
rollout_source   prompts to the groups of every step
build      the source of a run, from its configuration
"""
