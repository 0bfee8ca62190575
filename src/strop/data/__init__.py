"""The data room: from files to groups. Floor 2.

sources, readers      where rows come from, and one reader a file format
rows                  a row with its origin, and the refusal of one
shapes, formats       row -> Example: other tools' shapes, our own
messages              their messages and texts, validated
tokens                rows that are tokens already
template              which chat template: the tokenizer's, a file, a YAML template compiled to Jinja
sandbox               a template as a program: what it may take
chat, marks           Example -> text, with what is trained and what the row has written
encode                text -> ids and loss masks
truncate              limits: cut or drop
workshop, crew        all of these for some rows at a time, here or in several processes
table, cache          groups on disk, memory-mapped; found again by what they were made of
split                 what is held out
report, doctor        what became of every row; what may be wrong with the good ones
load                  all of it, wired
preference, show      preference files for other tools; one group for the eye
mismatch              prompts with completions of others
prepare               files into split files
"""
