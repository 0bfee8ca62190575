"""Examples to tokens: chat templates, what is trained, and limits. Floor 2.

chat_template      which template: the tokenizer's, a file, a YAML template compiled to Jinja
sandbox            a template as a program: what it may use
date               the day that a template prints
message_forms      how messages are handed to a template
template_writer    writes conversations by a template; knows the tokens that end an answer
markers, answers   where a row's own words and the answers lie in a rendering
from_prompt        a last answer behind its generation prompt, where it is rendered otherwise
refusals           what is said of rows that a template cannot write
render             Example -> text with its trained spans
encode             text -> ids and loss masks
token_rows         rows that are tokens already
truncate           limits: cut or drop
show               one group for the eye
"""
