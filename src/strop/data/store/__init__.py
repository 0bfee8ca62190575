"""Tokenised groups on disk, memory-mapped. Floor 2.

row_pipeline       rows -> records of a table: everything between a source and the disk
group_numbers      the numbers of a group beside its tokens: rewards, log-probs
worker_pool        several processes that work on rows; results come in the order of the rows
table              groups in an Arrow file, and views of them
token_cache        tokenised sources on disk, which later runs reuse
"""
