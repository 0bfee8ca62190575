"""Examples to tokens: chat templates, what is trained, and limits. Floor 2.

chat_template      which template: the tokenizer's, a file, a YAML template compiled to Jinja
sandbox            runs a template with limits on time and memory
date               the day that a template prints
message_forms      the forms in which templates expect messages
template_writer    renders conversations with a template; knows the tokens that end an answer
markers, answer_spans   find a row's own words, and the answers, in a rendered conversation
generation_prompt  a last answer placed behind its generation prompt, if the template renders it differently
refusals           the messages about rows that a template cannot write
render             Example -> text with its trained spans
encode             text -> ids and loss masks
token_rows         rows that are tokens already
truncate           limits: truncates rows, or drops them
show               shows single groups on the terminal
"""
