"""Times statopt's SASA+ on PyTorch, on demand, in an environment of its own.

`statopt_client.py` starts it with the Python of that environment. For each line that it
reads, "<optimizer> <steps>", it takes so many steps and prints the seconds a step took.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import time

import statopt  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

OPTIMIZERS = {
    "torch.optim.SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "statopt.SASA": lambda params: statopt.SASA(params, lr=1.0, momentum=0.9),
}


def parameters(size: int, num_leaves: int) -> list[torch.nn.Parameter]:
    leaves = [torch.full((size // num_leaves,), 0.1) for _ in range(num_leaves)]
    params = [torch.nn.Parameter(leaf) for leaf in leaves]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    return params


def seconds_per_step(optimizer: torch.optim.Optimizer, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--leaves", type=int, required=True)
    args = parser.parse_args()
    answers = sys.stdout
    # statopt prints as it goes.
    with contextlib.redirect_stdout(sys.stderr):
        optimizers = {
            name: make(parameters(args.size, args.leaves))
            for name, make in OPTIMIZERS.items()
        }
        versions = (importlib.metadata.version(name) for name in ("torch", "statopt"))
        print(*versions, file=answers, flush=True)
        for line in sys.stdin:
            name, steps = line.split()
            seconds = seconds_per_step(optimizers[name], int(steps))
            print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main()
