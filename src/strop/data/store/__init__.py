"""Tokenised groups on disk, memory-mapped. Floor 2.

records            rows -> records of a table: everything between a source and the disk
worker_pool        rows worked on by several processes, in their order
table              groups in an Arrow file, and views of them
token_cache        tokenised sources, found again by what they were made of
"""
