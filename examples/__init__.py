"""Programs to run, which the benchmarks import as well."""
