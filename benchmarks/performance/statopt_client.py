"""statopt's SASA+ on PyTorch, which runs in an environment of its own."""

import contextlib
import functools
import pathlib
import subprocess
from collections.abc import Callable, Iterator

from benchmarks.performance.optimizers import NUM_LEAVES, flat, optimizer_steps
from benchmarks.performance.timing import beside
from benchmarks.publishing import Row

SERVER = pathlib.Path(__file__).with_name("statopt_server.py")


@contextlib.contextmanager
def serving(
    python: pathlib.Path, size: int
) -> Iterator[tuple[list[str], Callable[[str, int], float]]]:
    """The versions of torch and statopt, and a function that times their steps."""
    # With -P the server's own folder is not searched for modules.
    command = [python, "-P", SERVER, "--size", str(size), "--leaves", str(NUM_LEAVES)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        requests, answers = server.stdin, server.stdout
        assert requests is not None
        assert answers is not None

        def seconds(name: str, count: int) -> float:
            print(name, count, file=requests, flush=True)
            return float(answers.readline())

        yield answers.readline().split(), seconds


def bench_statopt(python: pathlib.Path, size: int, rounds: int) -> Iterator[Row]:
    with serving(python, size) as (versions, seconds):
        base = optimizer_steps("sgd", flat(size))
        for name in ("torch.optim.SGD", "statopt.SASA"):
            yield {
                "section": "optimizer",
                "tree": f"{size:.0e}",
                "case": name,
                "baseline": "sgd",
                **beside(base.seconds, functools.partial(seconds, name), rounds),
                "versions": dict(zip(("torch", "statopt"), versions, strict=True)),
            }
