"""TIS-DPO, Token-level Importance Sampling for Direct Preference Optimization: a command line tool and a library.

The library's names are loaded on first use: importing the package loads neither torch nor any registry.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tisdpo_cli.library import preference_loss, token_scores, token_weights
    from tisdpo_cli.method.objectives import OBJECTIVES
    from tisdpo_cli.method.recipe import PRESETS
    from tisdpo_cli.method.steps import STEPS, Context, centers_of
    from tisdpo_cli.method.transforms import TRANSFORMS

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "STEPS",
    "TRANSFORMS",
    "Context",
    "__version__",
    "centers_of",
    "preference_loss",
    "token_scores",
    "token_weights",
]

_MODULES = {
    "OBJECTIVES": "method.objectives",
    "PRESETS": "method.recipe",
    "STEPS": "method.steps",
    "TRANSFORMS": "method.transforms",
    "Context": "method.steps",
    "centers_of": "method.steps",
    "preference_loss": "library",
    "token_scores": "library",
    "token_weights": "library",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
