"""Does it replace tuning? Every method on every task; the baselines are tuned.

A baseline with a rate to tune has it chosen from a grid by the validation data of the
first seed, and the grid is extended while its best is at an end. All others run as
their authors recommend. Each run is a line of benchmarks/results/evidence.jsonl, and
what is there is not run again.

    make evidence                                    # docs/evidence.md; an hour or two
    python -m benchmarks.evidence --tasks digits-mlp --methods salsa sgd-cosine
    python -m benchmarks.evidence --methods "salsa(window=Window(leak_ratio=4))"
    python -m benchmarks.evidence --anytime          # also a quarter and a half of it
    python -m benchmarks.evidence --tier large       # the larger models, hours
    python -m benchmarks.evidence --quick            # does it run? In seconds.
    python -m benchmarks.evidence.again progress     # after a change of these methods
    python -m benchmarks.evidence.search_interval    # the table in docs/salsa.md

A method may have arguments, as in the third line: to compare a candidate for a default
with the default. The second tier (`--tier large`) has tasks, methods, one seed and
results of its own: benchmarks/results/evidence-large.jsonl.
"""
