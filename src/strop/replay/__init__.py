"""`strop replay`: a step of a run taken again, and what its rows had to do with it. Floor 8.

retake    the step, from the nearest checkpoint, compared with the ledger; nothing is written into the run folder
row_scores  the rows of a step as text, with log-probs, rewards and their shares of the gradient
display   both as lines for a terminal
"""
