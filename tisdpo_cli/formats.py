"""The formats of datasets: the names and suffixes that readers, help texts and errors share.

Pure data. A new file format is one entry here and one parser in `PARSERS` of `tisdpo_cli/data/parsers.py`; a new shape
of rows is one name here and one entry in `CONVERTERS` of `tisdpo_cli/data/data_formats.py`.
"""

from __future__ import annotations

from typing import Literal

# Name to suffixes, the usual one first.
FORMATS: dict[str, tuple[str, ...]] = {
    "JSONL": (".jsonl", ".ndjson"),
    "JSON": (".json",),
    "CSV": (".csv", ".tsv"),
    "Parquet": (".parquet",),
}

# "JSONL, JSON, CSV or Parquet", for help texts and errors.
FORMAT_NAMES = f"{', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}"
# Suffix to the name of its format.
FORMAT_OF_SUFFIX: dict[str, str] = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}
# What a row holds: a pair; a pair with scores; or several answers, of which the best and the worst make the pair.
DataFormat = Literal[
    "pairs", "scored-pairs", "ultrafeedback", "rated-responses", "nectar", "pku-saferlhf", "pku-saferlhf-safer",
    "helpsteer3", "shp",
]  # fmt: skip
# What may follow the suffix of a text format.
COMPRESSED = ".gz"


def format_of(name: str) -> str | None:
    """Return the format of a file by its name, or None if it is unknown.

    >>> format_of("a/train.jsonl.gz"), format_of("x.CSV"), format_of("x.parquet.gz"), format_of("x")
    ('JSONL', 'CSV', None, None)
    """
    lower = name.lower()
    inner = lower.removesuffix(COMPRESSED)
    found = next((kind for suffix, kind in FORMAT_OF_SUFFIX.items() if inner.endswith(suffix)), None)
    # Parquet is compressed inside, and has to be read from its end.
    return None if found == "Parquet" and inner != lower else found
