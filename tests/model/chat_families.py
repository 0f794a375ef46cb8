"""Small tokenizers with templates in the shapes of seven families of chat models, written for these tests.

Their vocabularies have no merges, so a text and its ids determine each other. `shown` writes ids as text: every added
token between ⟦ and ⟧, all other tokens as the text they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_level(special: Sequence[str], plain: Sequence[str] = (), **names: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and added ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, special, plain, names)


def metaspace(
    special: Sequence[str], plain: Sequence[str] = (), prefix: str = "", **names: str
) -> PreTrainedTokenizerFast:
    """One token for each ASCII character, bytes for others; "▁" for a space.

    Args:
        special: special tokens.
        plain: other added tokens.
        prefix: who puts a "▁" before a text: `normalizer` before every part, `first` before the first one, or nobody.
        names: special tokens by name.
    """
    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": 1 + b for b in range(256)}}
    for character in ("▁", *map(chr, range(33, 127))):
        vocabulary[character] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
    else:
        backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(backend, ["<unk>", *special], plain, {"unk_token": "<unk>", **names})


def _finished(
    backend: Backend, special: Sequence[str], plain: Sequence[str], names: dict[str, str]
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def shown(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Ids as text, with ⟦ and ⟧ around each added token."""
    pieces = _pieces(tokenizer)
    return b"".join(pieces[i] for i in ids).decode()


@cache
def _pieces(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of each token."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    is_byte_level = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    added, pieces = tokenizer.added_tokens_decoder, []
    for i in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(i)
        if i in added:
            pieces.append(f"⟦{token}⟧".encode())
        elif is_byte_level:
            pieces.append(bytes(alphabet[character] for character in token))
        else:
            pieces.append(bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.encode())
    return pieces


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template; `begin` and `stop` are tokens that begin and end a turn."""

    tokenizer: PreTrainedTokenizerFast
    begin: str
    stop: str
    adds_space: bool = False


SMOL = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Reasoning is shown in the last turn only, and an empty block where there is none.
QWEN = r"""
{%- set start, end = '<|im_start|>', '<|im_end|>\n' -%}
{%- if tools -%}
    {{ start + 'system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') + 'Tools:' }}
    {%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor -%}
    {{ end }}
{%- elif messages[0].role == 'system' -%}
    {{ start + 'system\n' + messages[0].content + end }}
{%- endif -%}
{%- for m in messages -%}
    {%- set content, thought = m.content, m.reasoning_content | default('') -%}
    {%- if m.role == 'assistant' -%}
        {%- if not thought and '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
        {%- endif -%}
        {{ start + 'assistant\n' }}
        {%- if loop.last -%}
            {{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else -%}
            {{ content }}
        {%- endif -%}
        {%- for call in m.tool_calls or [] -%}
            {{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor -%}
        {{ end }}
    {%- elif m.role == 'tool' -%}
        {{ start + 'user\n<tool_response>\n' + content + '\n</tool_response>' + end }}
    {%- elif m.role == 'user' or not loop.first -%}
        {{ start + m.role + '\n' + content + end }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ start + 'assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""

LLAMA_3_1 = r"""
{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro -%}
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif -%}
{%- set system, rest = '', messages -%}
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content | trim, messages[1:] %}{% endif -%}
{{- header('system') + 'Today: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for m in rest -%}
    {%- if m.tool_calls -%}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('only one tool call at once') }}{% endif -%}
        {%- set call = m.tool_calls[0].function -%}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- elif m.role == 'tool' -%}
        {{- header('ipython') + m.content | tojson }}
    {%- else -%}
        {{- header(m.role) }}
        {%- if loop.first and tools %}{% for tool in tools %}{{ tool | tojson + '\n\n' }}{% endfor %}{% endif -%}
        {{- m.content | trim }}
    {%- endif -%}
    {{- '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif -%}
"""

GEMMA = r"""
{{- bos_token }}
{%- set lead, rest = '', messages -%}
{%- if messages[0].role == 'system' %}{% set lead, rest = messages[0].content + '\n\n', messages[1:] %}{% endif -%}
{%- for m in rest -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (lead if loop.first else '') }}
    {{- m.content | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""

# Tool calls are shown where a message has no content at all.
DEEPSEEK = r"""
{{- bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for m in messages -%}
    {%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif -%}
    {%- if m.role == 'assistant' and m.content is not defined -%}
        {{- '<｜Assistant｜>call ' + m.tool_calls[0].function.name + eos_token }}
    {%- elif m.role == 'assistant' -%}
        {{- '<｜Assistant｜>' + m.content + eos_token }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif -%}
"""

GPT_OSS = r"""
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '\nEffort: ' + (effort or 'medium') + '<|end|>' }}
{%- set lead, rest = '', messages -%}
{%- if messages[0].role in ('system', 'developer') -%}
    {%- set lead, rest = messages[0].content, messages[1:] -%}
{%- endif -%}
{%- if lead or tools -%}
    {{- '<|start|>developer<|message|>' + lead }}
    {%- for tool in tools or [] %}{{ '\n' + tool | tojson }}{% endfor -%}
    {{- '<|end|>' }}
{%- endif -%}
{%- set last = namespace(name='') -%}
{%- for m in rest -%}
    {%- if m.tool_calls -%}
        {%- set last.name = m.tool_calls[0].function.name -%}
        {{- '<|start|>assistant to=' + last.name + '<|channel|>commentary<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'tool' -%}
        {{- '<|start|>' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'assistant' -%}
        {%- set final = loop.last and not add_generation_prompt -%}
        {%- if final and 'thinking' in m -%}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif -%}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if final else '<|end|>') }}
    {%- elif m.role == 'user' -%}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}
"""

LLAMA_2 = r"""
{%- set lead, rest = '', messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set lead, rest = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
    {%- set content = ((lead if loop.first else '') + m.content).strip() -%}
    {{- bos_token + '[INST] ' + content + ' [/INST]' if m.role == 'user' else ' ' + content + ' ' + eos_token }}
{%- endfor -%}
"""


def families() -> dict[str, Family]:
    """A family for each shape."""
    chatml = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    think = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    headers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    channels = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
    made = {
        "smol": Family(byte_level(chatml.values(), **chatml), "<|im_start|>", "<|im_end|>"),
        "qwen": Family(byte_level(chatml.values(), think, eos_token="<|im_end|>"), "<|im_start|>", "<|im_end|>"),
        "llama3.1": Family(
            byte_level(headers, bos_token=headers[0], eos_token=headers[3]), "<|start_header_id|>", "<|eot_id|>"
        ),
        "gemma": Family(
            metaspace(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos_token="<bos>", eos_token="<eos>"),
            "<start_of_turn>",
            "<end_of_turn>",
        ),
        "deepseek": Family(
            byte_level((begin, end), ("<｜User｜>", "<｜Assistant｜>", "<｜hole｜>"), bos_token=begin, eos_token=end),
            "<｜User｜>",
            end,
        ),
        "gpt-oss": Family(byte_level(channels, eos_token="<|return|>"), "<|start|>", "<|return|>"),
        "llama2": Family(
            metaspace(("<s>", "</s>"), prefix="normalizer", bos_token="<s>", eos_token="</s>"), "<s>", "</s>", True
        ),
    }
    templates = (SMOL, QWEN, LLAMA_3_1, GEMMA, DEEPSEEK, GPT_OSS, LLAMA_2)
    for family, template in zip(made.values(), templates, strict=True):
        family.tokenizer.chat_template = template
    return made
