"""The one table of counters: what may be done to a row, and how the report says it. Floor 2."""

from __future__ import annotations

COUNTERS = {
    "messages_as_json": "rows held messages as JSON text, and were read as messages",
    "trailing_turns": "turns behind the last assistant turn left out (dataset.on_trailing_user: drop)",
    "system_unused": "rows have a system column and another system turn in their messages: the turn is used",
    "with_tools": "rows with tools, or with calls of some",
    "with_reasoning": "rows with reasoning",
    "media_unread": "rows have images, videos or sounds, which are not trained",
    "reasoning_unread": "rows have a column of reasoning beside their turns, which is not trained: write it under "
    "reasoning_content of the answer's message",
    "prompts_cut": "prompts cut at the left",
    "completions_cut": "",
    "without_end_token": "",
    "boundaries_split": "ends of generation prompts inside a token, encoded in two parts",
    "controls_as_text": "control tokens in the rows' words, encoded as text",
    "answers_as_history": "answers not trained: the template renders them otherwise than inference would, since turns "
    "follow (it drops their reasoning, or begins them without what its generation prompt ends with)",
    "answers_left_out": "answers not trained, as their rows say",
    "reasoning_dropped": "turns without their reasoning, which the template cannot write",
    "message_keys_unread": "rows have messages with keys that the chat template does not read",
    "template_kwargs_unread": "rows have chat_template_kwargs that the chat template does not read",
    "other_prompts": "rows whose prompt is not the one that inference sees: the template's generation prompt is no "
    "beginning of its own rendering (it ends with an open <think>, say, and the answers have none)",
    "double_bos": "",
}
"""Name in data.json -> what it counts, as the report says it; empty if the report says it in more detail."""

LEFT_OUT = {
    "trailing_turns": "the turns behind the last assistant turn",
    "system_unused": "the system column",
    "media_unread": "the column of images, videos or sounds",
    "reasoning_unread": "the column of reasoning",
}
"""What strop itself leaves out of a row, by the counter that counts it."""
