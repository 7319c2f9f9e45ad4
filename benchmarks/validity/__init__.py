"""Do the tests fire when they should? On dynamics whose law is known in closed form.

Momentum SGD on a quadratic with independent coordinates: the mean and the covariance of
parameters and momentum follow a linear recursion. So the expected excess loss at any
step, and its stationary value, are computed, not estimated. A drop is early if the
expected excess loss is then above 1.1 times its stationary value.

    make validity                                          # everything, into docs/
    python -m benchmarks.validity --cells base far         # a part
    python -m benchmarks.validity --publish                # only what is missing
    python -m benchmarks.validity.progress --publish       # adapt_on_progress
    python -m benchmarks.validity.calibration              # docs/calibration.md
    python -m benchmarks.validity.collapse                 # docs/collapse.md

A row that the results already hold is not computed again unless `--fresh` is given.

To try a test, a statistic or settings of your own, name a function without arguments
that returns keyword arguments of `sasa_optax.sasa_plus`, and a file for the results:

    python -m benchmarks.validity --methods zero_mean my_module:candidate --out my.json
"""
