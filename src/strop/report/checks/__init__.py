"""What is looked for in a run: each check is a function from `Facts` to findings, in most cases one. Floor 2.

start      what must hold before and at the first step, whatever the data: identities
data       the data, as data.json counts it
course     any method: numbers that are not finite, steps, gradients, evaluations
pairs      methods on a chosen and a rejected completion
accuracy   whether pairs are told apart; listed by `pairs`
unpaired   labelled completions and demonstrations
sampled_groups   sampled completions with rewards: lengths, ratios, entropy
sampled_rewards  what their rewards say
remedies   what several findings advise
"""
