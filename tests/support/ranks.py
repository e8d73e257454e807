"""Ranks: processes forked from one server that has imported torch and the trainer already.

A fresh Python takes 6 seconds of CPU to import them, a fork none.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

PRELOAD = ["tests.support.preload"]


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Where processes are forked from the server, which has no threads."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    return processes


def run_ranks(function: Callable, *arguments: Any, ranks: int) -> None:
    """Call `function(rank, *arguments)` in `ranks` processes; an error in one ends them all."""
    fork_context()
    torch.multiprocessing.start_processes(
        call_rank,
        args=(dict(os.environ), os.getcwd(), function, arguments),
        nprocs=ranks,
        start_method="forkserver",
    )


def call_rank(
    rank: int, environment: dict[str, str], folder: str, function: Callable, arguments: Any
) -> None:
    """The server has the environment of its own start: take that of the test."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    function(rank, *arguments)
