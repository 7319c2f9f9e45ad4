"""Programs that measure the library, and write what they find into docs/.

Run them from the root of a checkout: ``python -m benchmarks.evidence`` and the like.
"""
