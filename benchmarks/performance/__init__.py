"""What automatic scheduling adds to a training step, beside its peers.

Every number is a ratio to the plain optimizer, which is timed in alternating rounds of
the same process. Parameters and state are donated. Tables have the median over the
rounds and the quartiles.

    make bench                                               # everything, into docs/
    python -m benchmarks.performance --sections model        # a part, only printed
    python -m benchmarks.performance --sections --publish    # measures nothing
    python -m benchmarks.performance.scale                   # docs/scale.md

For a model of your own, name a function that takes `wrap`, a function from optimizer to
optimizer, applies it to its optimizer, and returns `step, carry, batch`, such that
`carry = step(carry, batch)` is a training step:

    python -m benchmarks.performance --own my_training:make_step
"""
