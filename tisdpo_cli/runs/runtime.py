"""The processes of a run, on accelerate: ranks, device, precision, collective calls, signals."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tisdpo_cli.errors import TisdpoError, TrainingError, UsageError
from tisdpo_cli.reporter import Reporter, Silent
from tisdpo_cli.runs.launch_checks import check_processes, check_request
from tisdpo_cli.runs.sharding import Sharding, without_accelerates_fsdp

T = TypeVar("T")

# Windows has none.
_HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)

_OTHER_STOPPED = "another process stopped; see its message"

# A layer saves about 34 values per token and unit of width (Korthikanti et al. 2022, without the attention matrix), of
# 2 bytes on a GPU, where activations get a quarter of the memory. On a CPU, where passes of 1,024 tokens are about as
# fast as larger ones, they get a GiB.
_BYTES_PER_UNIT, _SHARE_OF_MEMORY, _CPU_BYTES_PER_UNIT, _CPU_BYTES, _CPU_TOKENS = 70, 4, 136, 2**30, 4096


class Runtime:
    """This process and its place in the run."""

    def __init__(self, reporter: Reporter, sharding: Sharding | None = None) -> None:
        """Join the other processes, if any.

        Args:
            reporter: shows progress and notes.
            sharding: how the model of a training is split over the processes, or None for a whole model on each.

        Raises:
            TisdpoError: launched for several processes but running alone, or with a sharding that is not supported.
        """
        check_request()
        _deterministic()
        # The scorer handles precision; accelerate would wrap the model a second time.
        # Metrics are summed in float64, which Apple's GPUs do not have. Without a GPU accelerate would run each process
        # alone unless it is told that CPUs are meant.
        cpu = torch.backends.mps.is_available() or not torch.accelerator.is_available()
        with without_accelerates_fsdp():
            self.accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=_process_group(sharding))
        self.accelerator.gradient_accumulation_steps = 1
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        check_processes(self.world)
        self.reporter: Reporter = reporter if self.main else Silent()
        # A single process has nothing to split.
        self.sharding = sharding if self.world > 1 else None
        self._gpu_bytes = self._smallest_gpu()

    def on_main(self, work: Callable[[], T]) -> T:
        """Run a function on the first process and share its result, or its error, with all."""
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = work()
            except Exception as fault:
                known = isinstance(fault, TisdpoError)
                box[1] = fault if known else TrainingError(_OTHER_STOPPED)
                broadcast_object_list(box)
                raise
        broadcast_object_list(box)
        if box[1] is not None:
            box[1].shared = True
            raise box[1]
        return box[0]

    def on_all(self, work: Callable[[], list[T]]) -> list[T]:
        """Run a function on every process and concatenate its lists; the error of any process is raised on all."""
        if self.world == 1:
            return work()
        own: list[T] = []
        fault: Exception | None = None
        try:
            own = work()
        except Exception as error:
            fault = error
        known = fault if fault is None or isinstance(fault, TisdpoError) else TrainingError(_OTHER_STOPPED)
        everything = gather_object([(own, known)])
        if fault is not None and fault is not known:
            raise fault
        faults: list[TisdpoError] = [error for _, error in everything if error is not None]
        if faults:
            # Its own one has the traceback.
            first = known or faults[0]
            first.shared = True
            raise first
        return [item for items, _ in everything for item in items]

    def total(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        return self.accelerator.reduce(values, "sum") if self.world > 1 else values

    def mesh(self) -> DeviceMesh:
        """All processes, in the order of their ranks."""
        return init_device_mesh(self.device.type, (self.world,))

    def gather(self, items: list[T]) -> list[T]:
        """Concatenate the lists of all processes."""
        return gather_object(items) if self.world > 1 else items

    def _smallest_gpu(self) -> int | None:
        """Memory in bytes of the smallest GPU among all processes; None on CPUs."""
        if self.device.type != "cuda":
            return None
        total = torch.tensor([torch.cuda.get_device_properties(self.device).total_memory], device=self.device)
        return int(self.accelerator.gather(total).min())

    def token_budget(self, layers: int, width: int) -> int:
        """Tokens that one forward and backward pass should hold, from the shape of a model and the total memory.

        The same on every process, and independent of what else is in memory.
        """
        if self._gpu_bytes is None:
            tokens, most = _CPU_BYTES // (layers * width * _CPU_BYTES_PER_UNIT), _CPU_TOKENS
        else:
            tokens, most = self._gpu_bytes // (_SHARE_OF_MEMORY * layers * width * _BYTES_PER_UNIT), 65_536
        return max(1024, min(most, tokens // 256 * 256))

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def precision(self, dtype: str, scoring: bool = False) -> Literal["bf16", "float32"]:
        """The precision to compute in.

        Args:
            dtype: `auto`, `float32` or `bf16`.
            scoring: whether scores are made, which `auto` keeps in float32: models that differ by small updates give
                scores below the resolution of bf16.

        Raises:
            UsageError: bf16 was asked for on a GPU that does not support it.
        """
        gpu = self.device.type == "cuda"
        capable = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else True
        if dtype == "bf16" and not capable:
            raise UsageError("this GPU does not support bf16", where="--dtype bf16", fix="use float32")
        automatic = dtype == "auto" and gpu and capable and not scoring
        return "bf16" if dtype == "bf16" or automatic else "float32"


def _process_group(sharding: Sharding | None) -> list[Any]:
    """How processes talk: a model whose shards are in CPU memory has norms to sum there too."""
    if sharding is None or not sharding.offload or not torch.cuda.is_available():
        return []
    return [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")]


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype for autocast; None if weights and computation are float32."""
    return torch.bfloat16 if precision == "bf16" else None


def _deterministic() -> None:
    """Use deterministic kernels where there are some, for the same bytes every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What `use_deterministic_algorithms(True, warn_only=True)` does, without its import of the compiler: 1.5 s.
    torch.set_deterministic_debug_mode("warn")
    for words in ("does not have a deterministic implementation", "defaults to a non-deterministic algorithm"):
        warnings.filterwarnings("ignore", f".*{words}")
    # Filling fresh memory with NaN is for debugging and costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def deterministic_training() -> Iterator[None]:
    """Within this context, an operation without a deterministic kernel raises a RuntimeError.

    A mode that only warns is not enough: the backward passes of fused attention choose their deterministic kernels only
    in this one (`attention_backward.cu`).
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGHUP into a request to stop, answered between two updates.

    A second signal ends the program at once.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, _HANGUP):
            under_nohup = number == _HANGUP != signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN
            if not under_nohup:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            return
        handler = self._before[number]
        if not callable(handler) or handler is signal.default_int_handler:
            os._exit(128 + number)
        # The program's own handler reports the interruption.
        handler(number, frame)

    def agreed(self, runtime: Runtime) -> int:
        """The signal that any process received, 0 for none; the same on all processes."""
        if runtime.world == 1:
            return self.signal
        return int(runtime.accelerator.gather(torch.tensor([self.signal], device=runtime.device)).max())
