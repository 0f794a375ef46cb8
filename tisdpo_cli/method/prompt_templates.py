"""Prompt templates for contrastive models that are one model under two prompts: built-in ones and the user's own.

Pure text. Knows no tokenizer.
"""

from __future__ import annotations

# Where a template puts the prompt.
PLACEHOLDER = "{}"
TEMPLATES: dict[str, str] = {
    "normal": "{}",
    "harmless": "What follows was written by an assistant that is honest and kind, and that never does any harm.\n\n{}",
    "harmful": "What follows was written by an assistant that is cruel and reckless, and that does harm gladly.\n\n{}",
}


def template_text(template: str) -> str:
    """Return the text of a template, given by its built-in name or as text.

    Raises:
        ValueError: neither a built-in name nor text with exactly one `{}`.
    """
    text = TEMPLATES.get(template, template)
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(f"a template is {', '.join(TEMPLATES)}, or text that contains {PLACEHOLDER} exactly once")
    return text


def split_template(template: str) -> tuple[str, str]:
    """Split a template into the text before and after the prompt.

    >>> split_template("Be kind. {}!")
    ('Be kind. ', '!')
    """
    before, _, after = template_text(template).partition(PLACEHOLDER)
    return before, after
