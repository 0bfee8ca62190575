"""From files to groups. Floor 2.

read/              files, folders and data sets -> rows
shapes/            rows -> examples: prompts and completions as text
text/              examples -> tokens: chat templates, what is trained, limits
store/             tokenised groups on disk
load               runs all of these, from the configuration to groups
split              which rows are held out
mismatch           pairs every prompt with a completion of another row
counters           the table of everything that may be done to a row, with the words of the report
data_report, problems  what became of every row; what may be wrong with rows that can be trained on
split_files        `strop prepare`: files into split files
to_datasets        preference files for other tools, as a data set of the package datasets
prompt_groups      rows for whose prompts completions will be sampled
"""
