"""The examples: programs to run, and what the benchmarks import from them."""
