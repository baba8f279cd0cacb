"""Chat templates: a conversation as the text that a model was trained to continue.

Templates are programs in Jinja that come with a model. They run in a sandbox, with what Hugging Face's give them
(https://huggingface.co/docs/transformers/chat_templating) and nothing more.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..errors import InputError

Message = Mapping[str, Any]  # "role": system, user or assistant; "content": its text; and what else a template reads


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks what an assistant said: here only what is inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes what HTML would trip over."""
    return json.dumps(value, ensure_ascii=False, **options)


def render(
    template: str,
    messages: Sequence[Message],
    special: Mapping[str, str],
    add_generation_prompt: bool,
    **variables: Any,
) -> str:
    """The text of `messages` by `template`. `special` are tokens by name, as bos_token; `variables` what else it reads.

    Raises InputError with the template's own words where it refuses the conversation, or where it is no template.
    """
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    given = dict(special) | variables | {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        text = environment.from_string(template).render(given)
        text.encode()  # no tokenizer takes what is not Unicode
    except Exception as error:  # a template is a program, which may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template does not take this conversation: {reason}") from None
    return text
