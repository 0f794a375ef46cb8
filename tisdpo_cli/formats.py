"""The file formats of datasets: the names and suffixes that readers, help texts and errors share.

Pure data. A new format is one entry here and one parser in `PARSERS` of `tisdpo_cli/data/parsers.py`.
"""

from __future__ import annotations

# Name to suffixes, the usual one first.
FORMATS: dict[str, tuple[str, ...]] = {
    "JSONL": (".jsonl", ".ndjson"),
    "JSON": (".json",),
    "CSV": (".csv",),
    "Parquet": (".parquet",),
}

# "JSONL, JSON, CSV or Parquet", for help texts and errors.
FORMAT_NAMES = f"{', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}"
# Suffix to the name of its format.
FORMAT_OF_SUFFIX: dict[str, str] = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}
