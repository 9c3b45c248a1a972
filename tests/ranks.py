"""Functions on several gloo processes of this machine, for tests of `torch.distributed`."""

import os
import queue
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
LIMIT = 300  # seconds, for all processes; they need 10


def _work(rank, ranks, port, functions, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", rank=rank, world_size=ranks, store=dist.TCPStore("127.0.0.1", port, ranks, is_master=False)
    )
    try:
        for function in functions:
            results.put((rank, function.__name__, function(rank), None))
        dist.barrier()
        dist.destroy_process_group()
    except SystemExit:  # a process that dies
        results.put((rank, function.__name__, None, None))
        results.close(), results.join_thread()
        os._exit(1)
    except BaseException:
        results.put((rank, function.__name__, None, traceback.format_exc()))


def on_ranks(ranks, *functions):
    """What each `function(rank)` gives (numbers, lists, strings), by its name: a list, by rank."""
    context = mp.get_context("spawn")
    results = context.Queue()
    store = dist.TCPStore(
        "127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False
    )  # the system chooses a free port
    processes = [
        context.Process(target=_work, args=(rank, ranks, store.port, functions, results), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = {function.__name__: [None] * ranks for function in functions}
    end = time.monotonic() + LIMIT
    try:
        for _ in range(ranks * len(functions)):
            rank, name, found[name][rank], failure = results.get(timeout=max(0.0, end - time.monotonic()))
            assert failure is None, f"{name} on rank {rank}: {failure}"
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    except queue.Empty:
        pytest.fail(f"{ranks} ranks did not answer within {LIMIT} s")
    finally:
        for process in processes:
            process.kill()
    return found
