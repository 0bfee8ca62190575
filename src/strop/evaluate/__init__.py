"""`strop eval`: several models on the same rows, by the objective of a method, side by side. Floor 8.

scoring     a model's numbers, row by row
intervals   how sure the means and their differences are
lm_eval_tasks  tasks of lm-eval, by the same table
table       the numbers as text and as JSON
"""
