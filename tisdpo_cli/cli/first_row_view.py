"""The first row of a training in a few lines: the end of its prompt, its responses, what is scored, and the stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tisdpo_cli.engine.training.first_row import FirstRow, RowResponse, RowToken

# Tokens shown of a prompt, from its end, and of a response, from both ends.
_PROMPT, _HEAD, _TAIL = 20, 12, 8


def first_row_lines(row: FirstRow) -> list[str]:
    """Lines that show a row, without control characters: texts are written as Python does it."""
    prompt = "… " * (len(row.prompt) > _PROMPT) + _texts(row.prompt[-_PROMPT:], True)
    lines = [f"first row: {row.where}", f"first prompt ({len(row.prompt)} tokens): {prompt}"]
    if row.opening:
        opening = _texts(row.prompt[-row.opening :], True)
        lines.append(f"the chat template writes before every answer, so not scored: {opening}")
    for response in row.responses:
        lines.append(f"first {response.side} ({_count(response)}): {_head_and_tail(response.tokens)}")
    stops = {(stop.text, stop.id) for response in row.responses if (stop := response.stop)}
    lines += [f"the stop: {text!r} (id {token_id}), the last token of a response" for text, token_id in sorted(stops)]
    if any(not token.scored for response in row.responses for token in response.tokens):
        lines.append("in parentheses: weight 0, not scored")
    if any(token.weight is not None for response in row.responses for token in response.tokens):
        lines.append("in braces: the weight of a token in the loss")
    if row.swapped:
        lines.append("reverse training: 'chosen' is the dataset's rejected response")
    return lines


def _count(response: RowResponse) -> str:
    left = ", truncated: no stop" if response.stop is None else ""
    if response.scored == response.whole:
        return f"{response.whole} tokens, all scored"
    return f"{response.scored} of {response.whole} tokens scored{left}"


def _head_and_tail(tokens: Sequence[RowToken]) -> str:
    if len(tokens) <= _HEAD + _TAIL + 1:
        return _texts(tokens)
    return f"{_texts(tokens[:_HEAD])} … {_texts(tokens[-_TAIL:])}"


def _texts(tokens: Sequence[RowToken], of_prompt: bool = False) -> str:
    """Texts of tokens; those of a response that are not scored in parentheses."""
    return " ".join(_text(token, of_prompt) for token in tokens)


def _text(token: RowToken, of_prompt: bool) -> str:
    if not token.scored and not of_prompt:
        return f"({token.text!r})"
    return repr(token.text) if token.weight is None else f"{token.text!r}{{{token.weight:.2f}}}"
