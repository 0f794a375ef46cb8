"""Errors of process groups: which of them mean that another process is gone, and what is said then."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, TCPStore

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.errors import DataError, PeerEnded, is_peer_ended

# As torch 2.2 to 2.13 and NCCL 2.14 to 2.28 wrote them.
RECORDED = [
    RuntimeError(
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:1721. This is typically caused by a remote worker crashing. Check the logs of the remote worker "
        "before reporting an error. GLHF! 🏖️"
    ),
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:1: Connection reset by peer"
    ),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:446] writev [127.0.0.1]:5: Broken pipe"),
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation "
        "to complete"
    ),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:84] Application timeout caused pair closure"),
    DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
        "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 172.0.0.1<3> failed : "
        "Connection reset by peer"
    ),
    DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\nncclInternalError: Internal "
        "check failed.\nLast error:\nNet : Connection closed by remote peer user<50260>"
    ),
    RuntimeError(
        "NCCL communicator was aborted on rank 3. Original reason for failure was: [Rank 3] Watchdog caught collective "
        "operation timeout: WorkNCCL(SeqNum=56693, OpType=BROADCAST, Timeout(ms)=1800000) ran for 1804371 milliseconds "
        "before timing out."
    ),
    DistBackendError(
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', "
        "but store->get('0') got error: Connection reset by peer"
    ),
    DistNetworkError("failed to recv, got 0 bytes"),
]

OTHERS = [
    # Faults of this process, of its GPU, or of the launch.
    DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1331, unhandled cuda error (run with NCCL_DEBUG=INFO)"),
    DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:1287, invalid usage, NCCL version 2.17.1\nncclInvalidUsage: This usually "
        "reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA"
    ),
    DistNetworkError(
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use"
    ),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    # Of a download.
    RuntimeError("Connection reset by peer"),
    ConnectionResetError(104, "Connection reset by peer"),
    DataError("gloo: connection reset by peer"),
]


@pytest.mark.parametrize("error", RECORDED, ids=lambda error: str(error)[:60])
def test_a_lost_peer_is_recognised(error: Exception) -> None:
    assert is_peer_ended(error)
    told = explain(error)
    assert (type(told), told.exit_code) == (PeerEnded, 1)
    assert "another process of this run has ended" in str(told)
    assert "rerun the same command to resume" in str(told)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:60])
def test_other_errors_are_not_taken_for_one(error: Exception) -> None:
    assert not is_peer_ended(error)
    assert not isinstance(explain(error), PeerEnded)


def test_a_process_that_never_came_is_a_lost_peer() -> None:
    """Real errors of the store, in a moment."""
    soon = timedelta(milliseconds=300)
    with pytest.raises(DistStoreError) as absent:
        TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=soon, wait_for_workers=True)
    assert is_peer_ended(absent.value)
    store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=soon, wait_for_workers=False)
    with pytest.raises(DistStoreError) as silent:
        store.get("a key that nobody sets")
    assert is_peer_ended(silent.value)


def test_the_classes_are_those_of_torch() -> None:
    """They are recognised by name, so that reporting an error does not load torch."""
    assert issubclass(DistNetworkError, torch.distributed.DistError)
    assert {DistBackendError.__name__, DistNetworkError.__name__, DistStoreError.__name__} == {
        "DistBackendError", "DistNetworkError", "DistStoreError",
    }  # fmt: skip
