"""`strop generate`: what a model answers. Floor 7.

loading     a run, an adapter or a model, ready to answer; the base it was trained from
prompts     a prompt or a file of them, as tokens
sampling    tokens to tokens
answers     prompts to answers, in the terminal or as JSON Lines
output      the file of --output, for strop eval too
chat        a conversation in the terminal
while_training   answers to the same prompts at every evaluation of a run
"""
