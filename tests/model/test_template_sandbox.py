"""A template renders messages and does nothing else; whatever it does wrong is one sentence."""

from __future__ import annotations

import datetime
import json
import os
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tisdpo_cli.errors import DataError, ModelError
from tisdpo_cli.model.template_sandbox import END, START, CompiledTemplate

DAY = datetime.date(2024, 7, 26)
MESSAGES = [{"role": "user", "content": "Hi"}]


def render(source: str, **more: Any) -> str:
    return CompiledTemplate(source, DAY).render({"messages": MESSAGES, **more})


def refusal(source: str, **more: Any) -> str:
    with pytest.raises(DataError) as refused:
        render(source, **more)
    return str(refused.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0]['content'].__len__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner['__init__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ strftime_now.__self__ }}",
        "{{ range.__call__ }}",
        "{{ range(3)._ranges }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ namespace(_a=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_a_template_cannot_reach_beyond_its_variables(source: str) -> None:
    assert refusal(source).startswith("the chat template does what it may not: ")
    assert MESSAGES == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r[::-1] %}{% endfor %}{% endfor %}",
        "{{ range(10 ** 9) | list | length }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 12 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_cannot_go_on_for_ever(source: str) -> None:
    begin = time.monotonic()
    assert refusal(source).startswith("the chat template fails on this conversation: ")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ raise_exception(messages[0].content) }}", "refuses this conversation: Hi"),
        ("{{ raise_exception('x' * 999) }}", "refuses this conversation: " + "x" * 200),
        ("{{ raise_exception('') }}", "refuses this conversation: TemplateError"),
        ("{{ messages[0].text.strip() }}", "fails on this conversation: 'dict object' has no attribute 'text'"),
        ("{{ absent.role }}", "fails on this conversation: 'absent' is undefined"),
        ("{{ 1 / 0 }}", "fails on this conversation: ZeroDivisionError: division by zero"),
        (
            "{{ 'a' + 1 }}",
            'fails on this conversation: TypeError: can only concatenate str (not "int") to str',
        ),
        ("{{ messages | tojson(indent={}) }}", "fails on this conversation: TypeError: "),
        ("{% include 'other' %}", "fails on this conversation: TypeError: no loader for this environment specified"),
    ],
)
def test_what_a_template_raises_is_one_sentence(source: str, sentence: str) -> None:
    assert refusal(source).startswith(f"the chat template {sentence}")


def test_marks_are_not_shown_in_a_refusal() -> None:
    assert refusal("{{ raise_exception(text) }}", text=f"{START}<s>{END}") == (
        "the chat template refuses this conversation: <s>"
    )


@pytest.mark.parametrize(
    "source", ["{{ messages", "{% for %}", "{% other %}", "{{ 1 | nothing }}", "{" * 2 + "(" * 9999]
)
def test_a_template_that_is_no_template(source: str) -> None:
    with pytest.raises(ModelError) as refused:
        CompiledTemplate(source, DAY)
    assert str(refused.value).startswith("the chat template is not valid: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n    {% if true %}\n  {{ m.role }}\n    {%- endif %}\n{% endfor %}\nend\n",
        "{% for m in messages * 3 %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ loop.index }}{% endfor %}",
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{{ range(1, 9, 3) | list }}{{ range(4) | length }}{{ 2 in range(3) }}{{ range(3)[1] }}{{ range(4) | sum }}",
        "{{ data | tojson }}{{ data | tojson(indent=2) }}{{ data | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{{ data | tojson(ensure_ascii=True) }}",
        "{% set n = namespace(a=1) %}{% for i in range(3) %}{% set n.a = n.a * 2 %}{% endfor %}{{ n.a }}",
        "{% set n = namespace({'a': 1}, b=2) %}{{ n.a + n.b }}{{ dict(a=1).items() | list }}",
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}\n{{ x is defined }}",
        "{{ messages[0].absent }}|{{ 3 * 'ab' }}|{{ 2 ** 10 }}|{{ 1.5 * 2 }}|{{ data.items() | list | length }}",
        "{{ messages[0]['content'] | upper }}{{ tools is none }}{{ documents is none }}{{ bos_token }}",
    ],
)
def test_templates_render_as_in_transformers(source: str) -> None:
    data = {"b": "<a href='é'>&\x7f\u2028🙂", "a": [1, None, True, 0.5]}
    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=source, data=data, bos_token="<s>")
    assert render(source, data=data, tools=None, documents=None, bos_token="<s>") == theirs


def test_marks_survive_escapes_of_json() -> None:
    text = f"é{START}<s>{END}🙂"
    assert render("{{ t | tojson(ensure_ascii=True) }}", t=text) == f'"\\u00e9{START}<s>{END}\\ud83d\\ude42"'
    assert render("{{ t | tojson }}", t=text) == json.dumps(text, ensure_ascii=False)


def test_the_clock_stands_still() -> None:
    source = "{% macro now() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}{{ now() }}"
    assert render(source) == "26 Jul 2024 00:00"
    assert CompiledTemplate(source, DAY).reads_clock
    assert CompiledTemplate("{% if strftime_now is defined %}{% endif %}", DAY).reads_clock
    assert not CompiledTemplate("{# strftime_now #}{{ 'strftime_now' }}", DAY).reads_clock


def test_a_template_finds_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    assert os.environ["SECRET"] not in render("{{ self }}{{ messages }}{{ environ }}")
