"""From files to groups. Floor 2.

read/              files, folders and data sets -> rows
shapes/            rows -> examples: prompts and completions as text
text/              examples -> tokens: chat templates, what is trained, limits
store/             tokenised groups on disk
load               all of these, wired: from the configuration to groups
split              which rows are held out
mismatch           every prompt with a completion of another row
counters           what may be done to a row, and how people are told
report, doctor     what became of every row; what may be wrong with the good ones
split_files        `strop prepare`: files into split files
preference         preference files for other tools
"""
