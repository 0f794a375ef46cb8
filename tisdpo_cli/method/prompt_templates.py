"""Prompt templates for contrastive models that are one model under two prompts: a built-in pair, and the user's own.

Pure text; it knows no tokenizer.
"""

from __future__ import annotations

PLACE = "{}"
TEMPLATES: dict[str, str] = {
    "normal": "{}",
    "harmless": "What follows was written by an assistant that is honest and kind, and that never does any harm.\n\n{}",
    "harmful": "What follows was written by an assistant that is cruel and reckless, and that does harm gladly.\n\n{}",
}


def template_text(template: str) -> str:
    """The text of a template given by its built-in name or by itself.

    Raises:
        ValueError: it is no built-in name and does not hold `{}` exactly once.
    """
    text = TEMPLATES.get(template, template)
    if text.count(PLACE) != 1:
        raise ValueError(f"a template is {', '.join(TEMPLATES)}, or text with {PLACE} exactly once for the prompt")
    return text


def around(template: str) -> tuple[str, str]:
    """What stands before and after the prompt.

    >>> around("Be kind. {}!")
    ('Be kind. ', '!')
    """
    before, _, after = template_text(template).partition(PLACE)
    return before, after
