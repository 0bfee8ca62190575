"""Rows to examples: which shapes of rows are known, and what each means. Floor 2.

examples           row -> Example, or the reason why not
foreign            shapes of other tools, rewritten as strop's own
prompt_and_completions  prompts and completions in strop's own shape
messages           messages and texts of a row, validated
extra_columns      what stands beside the turns: system text, tools, media, reasoning
number_columns     the numbers of a row beside its completions: rewards, log-probs
json_columns       columns that hold JSON as text
"""
