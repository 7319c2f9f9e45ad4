"""The command line: makes the runs that are missing, and publishes docs/papers.md."""

import argparse
import os
import pathlib

from benchmarks import papers, processes, publishing
from benchmarks.papers import tables
from benchmarks.papers.methods import methods_of
from benchmarks.papers.protocols import PROTOCOLS, Protocol, protocol_named
from benchmarks.papers.runs import Job, Key, load, work
from benchmarks.publishing import DOCS, RESULTS


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers",
        description=papers.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=PROTOCOLS)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="FOLDER",
        help="the published run on these data; without it, a reduced one",
    )
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--epochs", type=int, help="with the drops in proportion")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--workers",
        type=int,
        help="processes; default: as many as cores, and one with --data, on one device",
    )
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS / "papers.jsonl"
    )
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    return parser.parse_args(arguments)


def jobs_of(args: argparse.Namespace, protocol: Protocol) -> list[Job]:
    """The runs that are asked for and not there yet."""
    methods = methods_of(protocol)
    names = args.methods or list(methods)
    if unknown := [name for name in names if name not in methods]:
        raise SystemExit(f"--methods must be of {', '.join(methods)}, got {unknown}.")
    data = protocol.stand_in if args.data is None else "folder"
    scale = protocol.reduced if args.data is None else protocol.published
    epochs = args.epochs or scale.epochs
    keys = [
        Key(protocol.name, data, name, seed, epochs)
        for seed in range(args.seeds)
        for name in names
    ]
    there = load(args.results)
    return [Job(key, args.data, args.results) for key in keys if key not in there]


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    protocol = protocol_named(args.experiment)
    workers = args.workers or (1 if args.data else os.cpu_count() or 1)
    failed = processes.run_with_progress(work, jobs_of(args, protocol), workers)
    rows = load(args.results)
    data = protocol.stand_in if args.data is None else "folder"
    print(tables.published(rows, protocol, data))
    if failed:
        raise SystemExit(f"failed: {', '.join(map(str, failed))}")
    if args.publish:
        parts = {protocol.name: tables.published(rows, protocol, protocol.stand_in)}
        publishing.write(DOCS / "papers.md", parts)


if __name__ == "__main__":
    main()
