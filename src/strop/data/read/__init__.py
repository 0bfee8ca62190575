"""Files, folders and data sets to rows, each with its origin. Floor 2.

sources            where rows come from, as the configuration names it
files              one reader per file format
arrow              rows of Arrow tables: Parquet, and what the package datasets keeps
saved_datasets     `save_to_disk` folders and hub data sets
row                a row with its origin, and the refusal of one
"""
