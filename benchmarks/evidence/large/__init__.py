"""The second tier of the evidence suite: larger tasks, each an hour on two cores."""
