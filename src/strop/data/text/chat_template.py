"""Chat templates: the tokenizer's own, a Jinja file, or a YAML template, which is compiled to Jinja. Floor 2.

In: `dataset.template` and the tokenizer. Out: a ChatTemplate, whose Jinja source renders every row and goes into the
saved tokenizer: what trained the model is what inference uses.

A YAML template says what stands around a message of each role:

    begin content end after [between]         user, system, tool: nothing of it is trained
    begin lead content end after [between]    assistant: trained are lead, content and end
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import jinja2
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from strop.config.yamlfile import parse
from strop.data.text.sandbox import has_generation_blocks
from strop.errors import ConfigError, ModelError

FOLDER = Path(__file__).parent.with_name("templates")
TOKEN = re.compile(r"(\{\{ ?(?:bos_token|eos_token) ?\}\})")
KEY = "dataset.template"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Envelope(_Strict):
    """What stands around a message. `{{ bos_token }}` and `{{ eos_token }}` in a text are the tokenizer's.

    begin, end: around the content. after: behind the end. between: behind that, if another turn follows. first, last:
    around a run of messages of this role (tool responses that share a turn).
    """

    begin: str = ""
    end: str = ""
    after: str = ""
    between: str = ""
    first: str = ""
    last: str = ""


class AssistantEnvelope(_Strict):
    """The envelope of an assistant turn. Trained are `lead` (what the model writes before the content), the content
    and `end`; `begin` is the generation prompt."""

    begin: str
    lead: str = ""
    end: str
    after: str = ""
    between: str = ""


class Tools(_Strict):
    """Tools stand behind the system text: `begin`, `each` + JSON for each tool, `end`. A call is its JSON between
    `call_begin` and `call_end`, with `separator` after a content or another call."""

    begin: str
    each: str
    end: str
    call_begin: str
    call_end: str
    separator: str = ""


class YamlTemplate(_Strict):
    """A chat template as data.

    bos: what a conversation begins with; `auto`: the BOS token, where the tokenizer puts one in front of a text.
    trim: contents lose the white space at their ends.
    system_mode: `own`: the system text has its own envelope; `default`: and `default_system` stands where a row has
    none; `merge_first_user`, `merge_last_user`: it stands in front of that user turn, with `merge_separator` between.
    """

    bos: str = ""
    trim: bool = False
    system_mode: Literal["own", "default", "merge_first_user", "merge_last_user"] = "own"
    default_system: str | None = None
    merge_separator: str = "\n\n"
    system: Envelope | None = None
    user: Envelope
    assistant: AssistantEnvelope
    tool: Envelope | None = None
    tools: Tools | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        merges = self.system_mode.startswith("merge")
        if merges and self.system is not None:
            raise ValueError("a system text that is merged has no envelope of its own")
        if self.system_mode == "default" and (self.default_system is None or self.system is None):
            raise ValueError("system_mode default needs default_system and an envelope for system")
        if self.system_mode != "default" and self.default_system is not None:
            raise ValueError("default_system is read under system_mode: default only")
        if self.tools is not None and self.system is None:
            raise ValueError("tools stand in the system turn, and there is no envelope for system")
        return self

    def jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The same template as Jinja, for this tokenizer."""
        return _Compiler(self, tokenizer).source()


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template. name: `tokenizer`, the name of a shipped template, or the path of a file.

    is_given: the tokenizer has it or the configuration names it; else it is the built-in one, for messages alone.
    """

    name: str
    source: str
    is_given: bool

    @property
    def is_the_tokenizers(self) -> bool:
        return self.name == "tokenizer"


def choose_template(named: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that `dataset.template` names, else the tokenizer's, else the built-in `plain`.

    Raises:
        ConfigError: there is no such template, or it is broken.
        ModelError: the tokenizer has several templates and no default.
    """
    if named is not None:
        return ChatTemplate(named, _named(named, tokenizer), is_given=True)
    if tokenizer.chat_template:
        return ChatTemplate("tokenizer", tokenizers_template(tokenizer), is_given=True)
    return ChatTemplate("plain", _shipped("plain").jinja(tokenizer), is_given=False)


def tokenizers_template(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool = False) -> str:
    """The tokenizer's template; it can have one for rows with tools and one for the others."""
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None))
    except ValueError as error:
        names = ", ".join(tokenizer.chat_template)
        raise ModelError(
            f"the tokenizer has several chat templates ({names}) and none of them is the default",
            expected="a template named default",
            fix="save the tokenizer with one chat template, or set dataset.template",
        ) from error


def shipped_templates() -> list[str]:
    """Names for `dataset.template`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts in front of a text by itself: its BOS token, or nothing."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x", add_special_tokens=True)["input_ids"]
    return list(full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)])


def _shipped(name: str) -> YamlTemplate:
    return _yaml((FOLDER / f"{name}.yaml").read_bytes(), name)


def _named(named: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if named in shipped_templates():
        return _shipped(named).jinja(tokenizer)
    path = Path(named).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"there is no template {named!r}",
            where=KEY,
            expected="one of " + ", ".join(shipped_templates()) + ", or the path of a YAML or Jinja file",
        ) from error
    if path.suffix.lower() in (".yaml", ".yml"):
        return _yaml(content, named).jinja(tokenizer)
    try:
        source = content.decode("utf-8")
        has_generation_blocks(source)
    except (UnicodeDecodeError, jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(
            f"the Jinja template is broken: {error}", where=f"{named}:{line}" if line else named
        ) from error
    return source


def _yaml(content: bytes, name: str) -> YamlTemplate:
    document = parse(content, name)
    try:
        return YamlTemplate.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(first["loc"])
        line = next((document.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in document.lines), None)
        raise ConfigError(
            f"{'.'.join(map(str, path)) or 'the template'}: {first['msg'].removeprefix('Value error, ')}",
            where=f"{name}:{line}" if line else name,
            expected="a YAML template (docs/data.md)",
        ) from error


class _Compiler:
    """Writes the Jinja of a YAML template. The source has no line of its own, so no white space can slip in."""

    def __init__(self, template: YamlTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template, self._tokenizer = template, tokenizer

    def source(self) -> str:
        t = self._template
        bos = t.bos
        if bos == "auto":
            bos = "{{ bos_token }}" if leading_tokens(self._tokenizer) else ""
        roles = [f"{{% if message['role'] == 'user' %}}{self._user(t.user)}"]
        roles.append(f"{{% elif message['role'] == 'assistant' %}}{self._assistant(t.assistant)}")
        if t.system is not None:
            roles.append(
                "{% elif message['role'] in ['system', 'developer'] %}"
                + self._around(t.system, _content(t), self._tools())
            )
        if t.tool is not None:
            roles.append(f"{{% elif message['role'] == 'tool' %}}{self._run(t.tool)}")
        roles.append(
            "{% else %}{{ raise_exception('the chat template has no place for a ' + message['role'] + ' turn') }}"
            "{% endif %}"
        )
        prompt = "{% if add_generation_prompt %}" + self._say(t.assistant.begin) + "{% endif %}"
        return self._say(bos) + self._before() + "".join(["{% for message in turns %}", *roles, "{% endfor %}", prompt])

    def _before(self) -> str:
        """Sets `turns`, and says what stands in front of them."""
        t = self._template
        is_system = "{% if messages and messages[0]['role'] in ['system', 'developer'] %}"
        if not t.system_mode.startswith("merge"):
            default = t.default_system
            if default is None and t.tools is None:
                return "{% set turns = messages %}"
            assert t.system is not None
            implied = self._around(t.system, self._literal(default or ""), self._tools())
            if default is None:
                implied = "{% if tools %}" + implied + "{% endif %}"
            return is_system + "{% else %}" + implied + "{% endif %}{% set turns = messages %}"
        first = " and found.at < 0" if t.system_mode == "merge_first_user" else ""
        return (
            f"{is_system}{{% set system = messages[0]['content'] + {self._literal(t.merge_separator)} %}}"
            "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
            "{% set found = namespace(at=-1) %}{% for message in turns %}"
            f"{{% if message['role'] == 'user'{first} %}}{{% set found.at = loop.index0 %}}{{% endif %}}{{% endfor %}}"
        )

    def _user(self, envelope: Envelope) -> str:
        content = _content(self._template)
        if self._template.system_mode.startswith("merge"):
            content = f"(system if loop.index0 == found.at else '') + {content}"
        return self._around(envelope, content)

    def _assistant(self, envelope: AssistantEnvelope) -> str:
        trained = "{{ " + self._literal(envelope.lead) + " + " + _content(self._template) + " }}" + self._calls()
        end = envelope.end + ("" if self._closes(envelope.end) else "{{ eos_token }}")
        return (
            self._say(envelope.begin)
            + "{% generation %}"
            + trained
            + self._say(end)
            + "{% endgeneration %}"
            + self._say(envelope.after)
            + self._between(envelope.between)
        )

    def _closes(self, end: str) -> bool:
        """Whether a control token of this tokenizer is in the end; else its EOS token has to follow."""
        if TOKEN.search(end):
            return True
        special = set(self._tokenizer.all_special_ids)
        special |= {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return not special.isdisjoint(self._tokenizer(end, add_special_tokens=False)["input_ids"])

    def _calls(self) -> str:
        tools = self._template.tools
        if tools is None:
            return ""
        name, separator = self._literal(tools.call_begin + '{"name": "'), self._literal(tools.separator)
        return (
            "{% for call in message['tool_calls'] or [] %}"
            "{% set function = call['function'] if call['function'] is defined else call %}"
            f"{{{{ ({separator} if message['content'] or not loop.first else '') + {name} + function['name'] "
            "+ '\", \"arguments\": ' + (function['arguments'] | tojson) + "
            f"{self._literal('}' + tools.call_end)} }}}}{{% endfor %}}"
        )

    def _tools(self) -> str:
        tools = self._template.tools
        if tools is None:
            return ""
        each = f"{{% for tool in tools %}}{self._say(tools.each)}{{{{ tool | tojson }}}}{{% endfor %}}"
        return f"{{% if tools %}}{self._say(tools.begin)}{each}{self._say(tools.end)}{{% endif %}}"

    def _run(self, envelope: Envelope) -> str:
        """A message of a run: `first` in front of the run, `last` behind it."""
        role = "message['role']"
        first = f"{{% if loop.first or loop.previtem['role'] != {role} %}}{self._say(envelope.first)}{{% endif %}}"
        last = f"{{% if loop.last or loop.nextitem['role'] != {role} %}}{self._say(envelope.last)}{{% endif %}}"
        return first + self._around(envelope, _content(self._template)) + last

    def _around(self, envelope: Envelope, content: str, behind: str = "") -> str:
        after = self._say(envelope.end + envelope.after) + self._between(envelope.between)
        return self._say(envelope.begin) + "{{ " + content + " }}" + behind + after

    def _between(self, text: str) -> str:
        return "{% if not loop.last %}" + self._say(text) + "{% endif %}" if text else ""

    def _say(self, text: str) -> str:
        return "{{ " + self._literal(text) + " }}" if text else ""

    def _literal(self, text: str) -> str:
        """A text as a Jinja expression."""
        parts = [self._part(part) for part in TOKEN.split(text) if part]
        return " + ".join(parts) or "''"

    def _part(self, text: str) -> str:
        if not TOKEN.fullmatch(text):
            return json.dumps(text, ensure_ascii=False)
        name = text.strip("{} ")
        return name if getattr(self._tokenizer, name) else "''"


def _content(template: YamlTemplate) -> str:
    return "((message['content'] or '') | trim)" if template.trim else "(message['content'] or '')"
