"""The second tier of the evidence suite: larger models, minutes a run, one seed."""
