"""Tokenizes the pairs of a split once, in one process or in several, and keeps the result.

Processes are spawned, not forked: torch, Arrow and the tokenizer have threads by now, and a fork copies the locks that
they hold but not the threads that would release them. A spawned process takes seconds to start, so small splits are
tokenized here.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from tisdpo_cli.data.arrow_files import ArrowWriter
from tisdpo_cli.data.chat_tokens import ChatStats, encode_chat
from tisdpo_cli.data.row_store import RowStore, no_progress
from tisdpo_cli.data.rows import BadRow, handle_bad_rows
from tisdpo_cli.data.spawning import Spawning
from tisdpo_cli.data.stored_pairs import Pair, StoredPairs
from tisdpo_cli.data.stored_tokens import SCHEMA, EncodedPairs, token_batch
from tisdpo_cli.data.tokens import EncodedPair, Limits, TruncationStats, encode_pairs
from tisdpo_cli.data.vocabulary import CHAT_OBSERVED, Vocabulary
from tisdpo_cli.errors import DataError

# Pairs that are tokenized together.
_CHUNK = 500
# Bytes of rows that are worth another process: what one tokenizes in the time that it takes to start.
_BYTES_PER_PROCESS = 8 * 2**20
# Chunks that wait for a process, of each.
_AHEAD = 3
# What systems raise that have no semaphores (as without a writable /dev/shm), or no room for a process.
_NO_PROCESSES = (OSError, NotImplementedError, ImportError)
# Splits from this size on show their progress.
_SHOWN_FROM = 5000


@dataclass(frozen=True)
class TokenOptions:
    """How pairs are tokenized.

    Attributes:
        limits: maximum lengths.
        templates: prompt templates to put around the prompts of conversations, each the text before and after.
        on_bad_row: `error` or `skip`, for conversations that the chat template cannot show.
    """

    limits: Limits
    templates: tuple[tuple[str, str], ...] = ()
    on_bad_row: str = "error"


@dataclass
class _Chunk:
    """Some consecutive pairs, tokenized, and what was counted on the way."""

    batch: pa.RecordBatch
    pairs: int
    stats: TruncationStats
    chat: ChatStats = field(default_factory=ChatStats)
    bad: list[BadRow] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        batch = self.batch.serialize().to_pybytes()
        return _received, (batch, self.pairs, self.stats, self.chat, self.bad, self.observed)


def _received(batch: bytes, *rest: Any) -> _Chunk:
    return _Chunk(pa.ipc.read_record_batch(pa.py_buffer(batch), SCHEMA), *rest)


@dataclass(frozen=True)
class Tokenized:
    """The tokens of a split.

    Attributes:
        encoded: its pairs, without those that a chat template cannot show.
        notices: messages for the user, without the name of the split, but for `skipped`.
        skipped: lines that report the rows that were left out.
        warning: what else the user should know, or None.
        stops: ids that end the answers of conversations.
        sizes: counts and lengths; see `TruncationStats.sizes`.
    """

    encoded: EncodedPairs
    notices: list[str]
    skipped: list[str]
    warning: str | None
    stops: set[int]
    sizes: dict[str, Any]


def tokenize(pairs: StoredPairs, options: TokenOptions, vocabulary: Vocabulary, store: RowStore) -> Tokenized:
    """Tokenize and truncate pairs, unless it was done before.

    Raises:
        DataError: a prompt has no tokens, or a chat template cannot show some rows that are not to be skipped.
    """
    known = vocabulary.depends_on(pairs.chat) if pairs.depends_on is not None else None
    depends_on = None if known is None else _depends_on(pairs, options, known)

    def build(stream: BinaryIO) -> None:
        writer, total = ArrowWriter(stream, SCHEMA), _Total(options)
        show = store.progress if len(pairs) >= _SHOWN_FROM else no_progress
        with show("tokenizing", len(pairs), 0, "pairs") as progress:
            for chunk in _chunks(pairs, options, vocabulary):
                writer.write(chunk.batch)
                total.add(chunk)
                progress.advance(chunk.pairs, {})
        writer.finish(total.about(pairs.chat))

    file = store.file(depends_on, build)
    about = file.about
    if pairs.chat:
        vocabulary.chat.observe(about["observed"])
    messages = about["notices"], about["skipped"], about["warning"]
    return Tokenized(EncodedPairs(file), *messages, set(about["stops"]), about["sizes"])


def _depends_on(pairs: StoredPairs, options: TokenOptions, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pairs": pairs.depends_on,
        "vocabulary": vocabulary,
        "limits": vars(options.limits),
        # Prompt templates around texts are added later.
        "templates": options.templates if pairs.chat else (),
        "on_bad_row": options.on_bad_row,
    }


class _Total:
    """What was counted over all chunks."""

    def __init__(self, options: TokenOptions) -> None:
        self._options = options
        self._stats, self._chat = TruncationStats(), ChatStats()
        self._bad: list[BadRow] = []
        self._observed: list[bool] = []
        self._pairs = 0

    def add(self, chunk: _Chunk) -> None:
        """Add a chunk."""
        self._pairs += chunk.pairs
        self._stats.add(chunk.stats)
        self._chat.add(chunk.chat)
        self._bad += chunk.bad
        self._observed = [*self._observed, *chunk.observed][:CHAT_OBSERVED]

    def about(self, chat: bool) -> dict[str, Any]:
        """The record of the file.

        Raises:
            DataError: there are bad rows that are not to be skipped.
        """
        skipped = handle_bad_rows(self._bad, self._pairs, self._options.on_bad_row)
        limits = self._options.limits
        return {
            "notices": [*self._stats.messages(limits), *self._chat.notices(limits)],
            "skipped": skipped,
            "warning": None if chat else self._stats.marked.warning(self._stats.rows),
            "stops": sorted(self._chat.stops),
            "observed": self._observed,
            "sizes": self._stats.sizes(),
        }


def _encode(pairs: Sequence[Pair], options: TokenOptions, vocabulary: Vocabulary) -> _Chunk:
    """Tokenize consecutive pairs, here.

    Raises:
        DataError: a prompt has no tokens.
    """
    if pairs[0].conversation is not None:
        return _encode_conversations(pairs, options, vocabulary)
    encoded, stats = encode_pairs(
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        [pair.row.where for pair in pairs],
        vocabulary,
        options.limits,
    )
    unprompted = next((pair for pair in encoded if not pair.prompt), None)
    if unprompted is not None:
        raise DataError(
            "the prompt has no tokens, so nothing predicts the first response token", where=unprompted.where
        )
    rows = [pair.index for pair in pairs]
    return _Chunk(token_batch(encoded, rows), len(pairs), stats)


def _encode_conversations(pairs: Sequence[Pair], options: TokenOptions, vocabulary: Vocabulary) -> _Chunk:
    stats, chat_stats = TruncationStats(), ChatStats()
    rows: list[int] = []
    encoded: list[EncodedPair] = []
    bad: list[BadRow] = []
    # Its own count of what is observed.
    chat = vocabulary.chat.copy()
    for pair in pairs:
        assert pair.conversation is not None
        where = pair.row.where
        row = encode_chat(pair.conversation, where, chat, vocabulary.bos, options.limits, chat_stats, options.templates)
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        chosen, rejected = row.responses
        rows.append(pair.index)
        encoded.append(EncodedPair(pair.index, where, row.prompt, chosen, rejected, row.opening, row.framed))
        stats.count(encoded[-1], row.whole_prompt, row.whole_prompt)
    return _Chunk(token_batch(encoded, rows), len(pairs), stats, chat_stats, bad, chat.observed)


# Processes ---------------------------------------------------------------------------------------------------------


def _chunks(pairs: StoredPairs, options: TokenOptions, vocabulary: Vocabulary) -> Iterator[_Chunk]:
    """All pairs in chunks, in order."""
    ranges = deque((begin, min(begin + _CHUNK, len(pairs))) for begin in range(0, len(pairs), _CHUNK))
    processes = min(_cores(), pairs.bytes_of_rows() // _BYTES_PER_PROCESS, len(ranges))
    # A process that was itself started for some work starts none.
    if processes > 1 and multiprocessing.parent_process() is None:
        # Such as a tokenizer with code of its own, or rows in memory, cannot be sent.
        with suppress(pickle.PicklingError, TypeError, AttributeError):
            yield from _in_processes(ranges, processes, pickle.dumps((pairs, options, vocabulary)))
    for begin, end in ranges:
        yield _encode(list(pairs.between(begin, end)), options, vocabulary)


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(ranges: deque[tuple[int, int]], processes: int, job: bytes) -> Iterator[_Chunk]:
    """Chunks from several processes, in order; what is left in `ranges` could not be done there."""
    spawning = Spawning()
    waiting: deque[Future[_Chunk]] = deque()
    try:
        pool = ProcessPoolExecutor(processes, spawning, _start_process, (job,))
    except _NO_PROCESSES:
        return
    try:
        for place in list(ranges):
            try:
                waiting.append(pool.submit(_encode_there, place))
            except _NO_PROCESSES:
                return
            if len(waiting) >= _AHEAD * processes:
                yield waiting.popleft().result()
                ranges.popleft()
        while waiting:
            yield waiting.popleft().result()
            ranges.popleft()
    except BrokenProcessPool:
        # A process could not start or was killed: the rest is done here.
        return
    finally:
        if ranges:
            # What is under way would be finished first.
            spawning.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


# What a process works on.
_job: list[tuple[StoredPairs, TokenOptions, Vocabulary]] = []


def _start_process(job: bytes) -> None:
    """Prepare a process of the pool: it leaves signals to the first one, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Processes share the cores; threads of the tokenizer would only wait for one another.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _job.append(pickle.loads(job))
    except Exception:  # the first process does the work then
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_there(place: tuple[int, int]) -> _Chunk:
    pairs, options, vocabulary = _job[0]
    return _encode(list(pairs.between(*place)), options, vocabulary)
