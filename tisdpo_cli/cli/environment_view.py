"""Terminal view of `env`: what it found, and the `TISDPO_*` variables without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tisdpo_cli.settings.layers import ENV_PREFIX, is_variable
from tisdpo_cli.text import visible

_SECRET_WORDS = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "AUTH", "CREDENTIAL", "CREDENTIALS"}
# Tokens of well-known services, credentials in an address, and long random words.
_SECRET_VALUE = re.compile(
    r"\b(hf|sk|pk|gh[opsu]|github_pat|glpat|xox[abp])[-_][\w-]{8,}|\b(AKIA|ya29|eyJ)[\w.-]{8,}|://[^/\s]*@"
    r"|(?<![\w/.-])(?=\w*\d)(?=\w*[A-Za-z])\w{32,}(?![\w/.-])|(token|key|secret|password)[\w-]*\s*[=:]",
    re.IGNORECASE,
)
_UNKNOWN, _HIDDEN = "(no such setting; value not shown)", "(looks like a secret; value not shown)"


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The `TISDPO_*` variables with what may be shown of their values."""
    return {name: _shown(name, environ[name]) for name in sorted(environ) if name.startswith(ENV_PREFIX)}


def _shown(variable: str, value: str) -> str:
    name = variable[len(ENV_PREFIX) :]
    if not is_variable(name.lower().replace("__", ".")):
        return _UNKNOWN
    secret = _SECRET_WORDS & set(name.upper().split("_")) or _SECRET_VALUE.search(value)
    return _HIDDEN if secret else value


def lines(found: Mapping[str, str]) -> str:
    """One line per entry."""
    return "\n".join(visible(f"{name}: {value}") for name, value in found.items())
