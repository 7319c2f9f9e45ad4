"""The protocols of the two papers, on their own data or, reduced, on others.

The hand-tuned schedule, SASA, SASA+, SLOPE, SSLS and SALSA, with their authors'
options, and AdamW and momentum SGD with adapt_on_progress. Each run is a line of
benchmarks/results/papers.jsonl, and what is there is not run again.

    python -m benchmarks.papers cifar10                      # reduced, on Fashion-MNIST
    python -m benchmarks.papers cifar10 --data cifar-10-batches-py
    python -m benchmarks.papers wikitext2 --methods hand-tuned salsa --epochs 10
    make papers                                              # docs/papers.md
"""
