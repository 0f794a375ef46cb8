"""A split of a scored dataset with the weight of every token: the input of everything inspect-weights shows.

Its pairs are weighted when they are asked for, and all their numbers once, into columns on disk: no list of pairs is
ever in memory. Knows files, tokenizers and token weights; it knows no settings and no views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tisdpo_cli.data.chat_tokens import ChatOptions
from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.data.locate import TRAIN, find_splits, named_split
from tisdpo_cli.data.pairs import Pair, read_pairs
from tisdpo_cli.data.rows import BadRow, batches, handle_bad_rows
from tisdpo_cli.data.scored import check_unchanged, read_manifest, require_scores
from tisdpo_cli.data.tokens import Vocabulary
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.engine.inspection.disk_arrays import Column
from tisdpo_cli.engine.inspection.split_columns import SplitColumns
from tisdpo_cli.engine.inspection.weighted_pairs import InspectedPair, PairWeighter, encoded_responses
from tisdpo_cli.engine.scoring.token_weights import (
    AT_START,
    PAIRS_AT_ONCE,
    TokenWeighter,
    fit_centers,
    token_weighter,
    weights_at_start,
)
from tisdpo_cli.errors import UsageError
from tisdpo_cli.method.recipe import Recipe
from tisdpo_cli.method.steps import Centers
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SplitOptions:
    """How a split of a scored dataset is read and weighted.

    Attributes:
        split: name of the split.
        columns: column names.
        on_bad_row: `error` or `skip`.
        parse_data: whether special tokens spelled out in data become these tokens.
        chat: how conversations are rendered.
        tokenizer: directory or hub id, or None for the tokenizer in the dataset directory.
        make_recipe: the recipe for a file with EOS scores (True) or without (False).
        centered: whether the recipe subtracts mean scores of the train split.
        final: whether the weight columns hold final weights.
        seed: of random transforms.
        others: other recipes whose weights are computed too, by name, from the recipe in use.
        key: what pairs are sorted by, highest first.
    """

    split: str
    columns: Columns
    on_bad_row: str
    parse_data: bool
    chat: ChatOptions
    tokenizer: str | None
    make_recipe: Callable[[bool], Recipe]
    centered: bool
    final: bool
    seed: int
    others: Callable[[Recipe], Mapping[str, Recipe]]
    key: Callable[[InspectedPair], float]


@dataclass(frozen=True)
class WeightedSplit:
    """Pairs with usable scores, each weighted when it is asked for, and notices about the other rows.

    Attributes:
        columns: numbers of all pairs.
        others: other recipes, by name, for which the columns have weights too.
        notices: messages for the user.
    """

    columns: SplitColumns
    others: Mapping[str, Recipe]
    notices: list[str]
    _pairs: Sequence[Pair]
    _usable: np.ndarray
    _weigher: PairWeighter

    @property
    def weighter(self) -> TokenWeighter:
        """How scores become weights."""
        return self._weigher.weighter

    @property
    def final(self) -> bool:
        """Whether the weight columns hold final weights."""
        return self.weighter.recipe.final

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, position: int) -> InspectedPair:
        (pair,) = self._weigher.weigh([self._pairs[int(self._usable[position])]])
        assert isinstance(pair, InspectedPair)
        return pair

    def __iter__(self) -> Iterator[InspectedPair]:
        return (pair for pair in self._weigher.weigh(self._pairs) if isinstance(pair, InspectedPair))

    def under(self, name: str, pair: InspectedPair) -> InspectedPair:
        """One of its pairs under another recipe."""
        return self._weigher.under(self.others[name], pair)


def read_weighted_split(scored: str, options: SplitOptions) -> WeightedSplit:
    """Read a split of a scored dataset and compute the weight of every token.

    Args:
        scored: path or hub id of the dataset.
        options: how to read and weight it.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or has no such split.
    """
    files = find_splits(scored)
    file = named_split(files, options.split, scored, "--split")
    read = read_pairs(file, options.columns, options.on_bad_row)
    require_scores((pair.row for pair in read.pairs), scored, options.final)
    manifest = read_manifest(Path(scored).expanduser()) or {}
    changed = check_unchanged(manifest, file, options.final)
    tokenizer = load_tokenizer(_tokenizer_path(options.tokenizer, scored), parse_data=options.parse_data)
    at_start = not manifest and weights_at_start(tokenizer, read.pairs)
    chat = ChatEncoder(tokenizer, options.chat)
    vocabulary = vocabulary_of(tokenizer, chat, at_start)
    centers = _centers(options, files[TRAIN], vocabulary) if options.centered else None
    weighter = token_weighter(options.make_recipe, options.seed, tokenizer, read.pairs, centers, at_start)
    others = options.others(weighter.recipe)
    weigher = PairWeighter(weighter, vocabulary, chat)
    columns, usable, bad = SplitColumns(others, options.key), Column(np.int64), list[BadRow]()
    for position, pair in enumerate(weigher.weigh(read.pairs)):
        if not position:
            chat.check(manifest.get("chat"), scored)
        if isinstance(pair, BadRow):
            bad.append(pair)
            continue
        usable.append([position])
        columns.add(pair, {name: weigher.under(recipe, pair) for name, recipe in others.items()})
    skipped = handle_bad_rows(bad, len(read.pairs), options.on_bad_row)
    # Editing scores is legitimate and needs no warning; a file of final weights may still hold scores.
    warnings = [*([changed] if changed and options.final else []), *([AT_START] if at_start else [])]
    notices = [*read.notices, *warnings, *skipped]
    return WeightedSplit(columns, others, notices, read.pairs, usable.array(), weigher)


def _centers(options: SplitOptions, train: Path, vocabulary: Vocabulary) -> Centers:
    """The means that training subtracts: those of the train split, whatever split is shown."""
    pairs = read_pairs(train, options.columns, options.on_bad_row).pairs
    encoded = (ids for batch in batches(pairs, PAIRS_AT_ONCE) for ids, _ in encoded_responses(batch, vocabulary))
    return fit_centers(pairs, ((len(chosen), len(rejected)) for chosen, rejected in encoded))


def _tokenizer_path(tokenizer: str | None, scored: str) -> Path:
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        return path if (path / "tokenizer_config.json").is_file() else locate_model(tokenizer, "--tokenizer")
    dataset = Path(scored).expanduser()
    folder = dataset if dataset.is_dir() else dataset.parent
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError("no tokenizer in the dataset directory", where=scored, fix="pass --tokenizer PATH")
    return folder
