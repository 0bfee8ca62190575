"""The data room: from files to groups. Floor 2.

sources, readers      where rows come from, and one reader a file format
rows                  a row with its origin, and the refusal of one
formats               row -> Example: shapes and validation
chat, marks           Example -> text, with what is trained and what the row has written
encode                text -> ids and loss masks
truncate              limits: cut or drop
split, report         what is held out; what became of every row
load                  all of it, wired
preference, show      preference files for other tools; one group for the eye
plan                  which groups make which step
"""
