"""A record of a run: how the rate moved, and why."""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sasa_optax import _display, _plot, _records
from sasa_optax._metrics import next_test, read_test, why_no_cut
from sasa_optax._records import Row
from sasa_optax._stationarity import TestResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COUNTS = ("num_overshoots", "num_brakes", "num_nonfinite")
# By noise and by heavy momentum, up to half of the updates go up the gradient. In a
# chain in the wrong order, nearly all do.
_MIN_COMPARED, _MOST = 32, 0.75


@dataclasses.dataclass(frozen=True)
class Drop:
    """A cut of the rate, and the test that made it; ``str()`` says it in a sentence.

    Attributes:
      step: the step at which the test fired; or, where several drops were made since
        the record before, the step of the record that shows them.
      rate_name: "learning_rate", or "scale" for `reduce_on_stationarity`.
      old_rate: the rate before.
      new_rate: the rate after.
      test: what the test said, or None if the records lie too far apart to see it.
    """

    step: int
    rate_name: str
    old_rate: float
    new_rate: float
    test: TestResult | None

    def __str__(self) -> str:
        name = self.rate_name.replace("_", " ")
        rates = f"{name} {self.old_rate:.3g} -> {self.new_rate:.3g}"
        if self.test is None:
            return (
                f"by step {self.step}: {rates}. The test was missed: record at least "
                f"every min_samples steps to see why."
            )
        return (
            f"step {self.step}: progress has stopped. Over the newest "
            f"{self.test.num_samples} samples the statistic averaged "
            f"{self.test.mean:.3g}, interval {_interval(self.test)}; {rates}."
        )


@dataclasses.dataclass(frozen=True)
class Switch:
    """The end of SALSA's line search; ``str()`` says it in a sentence.

    Attributes:
      step: the step at which it ended; where that was missed, because the records lie
        too far apart, the step of the record that shows it.
      learning_rate: the rate that was found.
      test: what the test of the losses' slope said; None if a drop ended the search.
    """

    step: int
    learning_rate: float
    test: TestResult | None

    def __str__(self) -> str:
        rate = f"{self.learning_rate:.3g}"
        found = f"step {self.step}: the line search has ended at learning rate {rate}"
        if self.test is None:
            return f"{found}, by a drop."
        return (
            f"{found}: the newest {self.test.num_samples} losses fall no more, slope "
            f"{self.test.mean:.3g} in {_interval(self.test)}."
        )


def _interval(test: TestResult) -> str:
    return f"[{test.lower:.3g}, {test.upper:.3g}] (p = {test.p_value:.2g})"


def _since_the_drop(row: Row) -> str:
    """Why the newest test made no drop, and when the next can run."""
    test = read_test("test", row)
    if test.step <= row["last_drop"]:
        return next_test(row)
    return (
        f"step {test.step}: no drop, since {why_no_cut(test)}; mean {test.mean:.3g}, "
        f"interval {_interval(test)}. {next_test(row)}"
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """A cut of the scale by `adapt_on_progress`; ``str()`` says it in a sentence.

    Attributes:
      step: the step at which it was made. If several were made since the record
        before, the step of the record that shows them.
      is_brake: whether the parameters went back to their average: a brake, or several
        cuts with a brake among them. False for an overshoot.
      old_scale: the scale at the record before.
      new_scale: the scale at the record that shows the cut.
      num_cuts: how many were made since the record before.
      num_nonfinite: how many losses were not finite since the record before.
    """

    step: int
    is_brake: bool
    old_scale: float
    new_scale: float
    num_cuts: int = 1
    num_nonfinite: int = 0

    def __str__(self) -> str:
        scales = f"scale {self.old_scale:.3g} -> {self.new_scale:.3g}"
        if self.num_cuts > 1:
            kind = "with a brake among them" if self.is_brake else "all overshoots"
            return (
                f"by step {self.step}: {self.num_cuts} cuts, {kind}; {scales}. Record "
                "more often to see each."
            )
        if not self.is_brake:
            return (
                f"step {self.step}: overshoot. The loss gave back more than a tenth of "
                f"its gain after the rate rose; {scales}."
            )
        why = "gave back more than half of its gain, or rose above its start"
        if self.num_nonfinite:
            why = "was not finite"
        return (
            f"step {self.step}: brake. The loss {why}; the parameters went back to "
            f"their average, {scales}."
        )


def _to_python(name: str, value: Any) -> bool | int | float:
    """A number that every format can hold."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.shape:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    number = array.item()
    # Python's own integers may be too large for a float.
    if array.dtype.kind == "O" or not isinstance(number, bool | int | float):
        raise ValueError(f"{name} must be a real number, got {value!r}.")
    return number


class History:
    """A record, on the host, of how the rate moved in a run, and why.

    Feed it `metrics` every so many steps: at least every ``min_samples``, so that it
    sees each test that made a drop, since no test comes sooner than that after a drop;
    but not at every step, since each call of `record` waits for the device. Feed it the
    metrics of `adapt_on_progress` every 10 to 100 steps. Start with those of
    ``optimizer.init``: the second record is compared with the first.

    Args:
      path: a file of JSON lines to which each record is appended, so that a killed job
        loses at most the record that it was writing. If the file exists, its records
        are read first. Default None: records are in memory only.

    Attributes:
      rows: the records, each a dict of Python numbers.
      drops: the drops of the rate seen so far, each a `Drop`.
      cuts: the overshoots and brakes of `adapt_on_progress` seen so far, each a `Cut`.
      switch: the end of SALSA's line search, a `Switch`; None before that, and for all
        other optimizers.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> history = sasa_optax.History()
      >>> state = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
      >>> if drop := history.record(sasa_optax.metrics(state), loss=0.7):
      ...     print(drop)
      >>> history.rows[0]["loss"]
      0.7
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.rows: list[Row] = []
        self.drops: list[Drop] = []
        self.cuts: list[Cut] = []
        self.switch: Switch | None = None
        if path is not None and os.path.exists(path):
            for row in _records.read(path):
                self._add(row)
            _records.mend(path)
        self._path = path

    def record(
        self, metrics: Mapping[str, Any], **values: Any
    ) -> Drop | Cut | Switch | None:
        """Adds a row, and returns what happened since the row before.

        Rows of the same or a later step are forgotten first, so a run that was restored
        from a checkpoint goes on from there.

        Args:
          metrics: what `sasa_optax.metrics` returned, without prefixes. Give each part
            of the state a `History` of its own if there are prefixes.
          **values: more scalars to keep, such as ``loss=loss``, which is plotted.

        Returns:
          A drop, else a cut, else the end of the line search, else None.

        Raises:
          ValueError: if ``metrics`` is not of one optimizer, or one of the values is
            no scalar or has the name of a metric.
        """
        if not isinstance(metrics, Mapping):
            raise ValueError(
                "metrics must be what `sasa_optax.metrics(opt_state)` returned, got "
                f"{type(metrics)}."
            )
        if "step" not in metrics or not metrics.keys() & {"num_drops", "progress"}:
            raise ValueError(
                "metrics must be those of one optimizer, with the key 'step', and with "
                f"'num_drops' or 'progress', got the keys {sorted(metrics)}."
            )
        if clash := sorted(metrics.keys() & values.keys()):
            raise ValueError(f"values must not be named as metrics are, got {clash}.")
        fetched = jax.device_get({**metrics, **values})
        row = {name: _to_python(name, value) for name, value in fetched.items()}
        event = self._add(row)
        if self._path is not None:
            _records.append(self._path, row)
        return event

    def _add(self, row: Row) -> Drop | Cut | Switch | None:
        last = self._rewind(row["step"])
        self.rows.append(row)
        return None if last is None else self._compare(last, row)

    def _rewind(self, step: float) -> Row | None:
        """Forgets what is not before a step, and returns the newest row before it."""
        while self.rows and self.rows[-1]["step"] >= step:
            self.rows.pop()
        last = self.rows[-1] if self.rows else None
        seen = last["step"] if last else 0
        for events in (self.drops, self.cuts):
            while events and events[-1].step > seen:
                events.pop()
        if self.switch is not None and self.switch.step > seen:
            self.switch = None
        return last

    def _compare(self, last: Row, row: Row) -> Drop | Cut | Switch | None:
        """Keeps and returns what happened between two rows."""
        drop, cut = self._drop_between(last, row), self._cut_between(last, row)
        switch = self._switch_between(last, row, drop)
        self.drops += [drop] if drop else []
        self.cuts += [cut] if cut else []
        self.switch = switch or self.switch
        return drop or cut or switch

    def _switch_between(self, last: Row, row: Row, drop: Drop | None) -> Switch | None:
        was_active = last.get("line_search_active", False)
        if not was_active or row["line_search_active"]:
            return None
        if not row["loss_test_stationary"]:
            assert drop is not None
            return Switch(drop.step, drop.old_rate, test=None)
        rate = row["learning_rate"] if drop is None else drop.old_rate
        test = read_test("loss_test", row)
        return Switch(int(row["loss_test_step"]), rate, test)

    def _drop_between(self, last: Row, row: Row) -> Drop | None:
        num_drops = row.get("num_drops", 0) - last.get("num_drops", 0)
        if num_drops == 0:
            return None
        rates = self.rate_name, last[self.rate_name], row[self.rate_name]
        # The next test after a drop finds the window refilled; until then the newest
        # test is the one that fired.
        if num_drops > 1 or not row["test_stationary"]:
            return Drop(int(row["step"]), *rates, test=None)
        return Drop(int(row["test_step"]), *rates, test=read_test("test", row))

    def _cut_between(self, last: Row, row: Row) -> Cut | None:
        if "num_brakes" not in row:
            return None
        new = {name: int(row[name] - last[name]) for name in _COUNTS}
        num_cuts = new["num_overshoots"] + new["num_brakes"]
        if num_cuts <= 0:
            return None
        return Cut(
            step=int(row["last_cut" if num_cuts == 1 else "step"]),
            is_brake=new["num_brakes"] > 0,
            old_scale=last["scale"],
            new_scale=row["scale"],
            num_cuts=num_cuts,
            num_nonfinite=new["num_nonfinite"],
        )

    @property
    def rate_name(self) -> str:
        """Which key is the rate: "learning_rate", or "scale" where there is none."""
        # `adapt_on_progress` cuts the scale, even where the rate is known.
        names = self.rows[0].keys() if self.rows else ()
        has_rate = "learning_rate" in names and "num_drops" in names
        return "learning_rate" if has_rate else "scale"

    def explain(self) -> str:
        """The end of the line search, every drop and every cut, a line each.

        For `adapt_on_progress` a line has the scale and its peak, and another says if
        no loss arrives. Where a test decides, the last line says why the newest one
        made no drop, and when the next can run. A line says so if most updates went up
        the gradient, as they do in a chain in the wrong order.
        """
        events = [*([self.switch] if self.switch else []), *self.drops, *self.cuts]
        events.sort(key=lambda event: event.step)
        is_adapting = any("num_brakes" in row for row in self.rows)
        nothing = "been cut" if is_adapting else "dropped"
        lines = [*map(str, events)] or [f"The rate has not {nothing}."]
        lines += self._scale() if is_adapting else []
        lines += self._ascents()
        if self.rows and "next_test" in self.rows[-1]:
            lines += [_since_the_drop(self.rows[-1])]
        return "\n".join(lines)

    def _scale(self) -> list[str]:
        """How far `adapt_on_progress` has moved the scale, and if it sees no loss."""
        top, last = max(self.rows, key=lambda row: row["scale"]), self.rows[-1]
        lines = [
            f"The scale is {last['scale']:.3g} at step {last['step']}. Its highest was "
            f"{top['scale']:.3g}, at step {top['step']}."
        ]
        if last["step"] > 0 and not last["sees_loss"]:
            lines += [
                "No loss arrives, so it never rises. Call update with value=loss."
            ]
        return lines

    def _ascents(self) -> list[str]:
        """A line about updates that went up the gradient, if most of them did."""
        counts = [row.get("num_ascents", 0) for row in self.rows]
        if not counts:
            return []
        # Steps that are not compared are not counted, as those after a line search.
        steps = int(self.rows[counts.index(counts[-1])]["step"])
        if steps < _MIN_COMPARED or counts[-1] <= _MOST * steps:
            return []
        return [
            f"{counts[-1]} of the first {steps} updates went up the gradient. Is the "
            "chain in the wrong order? `scale_by_sasa_plus`, `scale_by_ssls` and "
            "`scale_by_salsa` come after directions such as `optax.scale_by_adam()`, "
            "`reduce_on_stationarity` after a complete optimizer such as "
            "`optax.adam(1e-3)`."
        ]

    def status(self) -> str:
        """The newest record in a line: step, loss, rate, progress and what comes next.

        It is plain text, for a terminal, a progress bar or a log. The rate "may" rise
        or fall, since other conditions than progress must hold as well, and a test runs
        at the step given at the earliest. Before the first record it says that there is
        none.

        Example:
          >>> import jax.numpy as jnp
          >>> import sasa_optax
          >>> history = sasa_optax.History()
          >>> state = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
          >>> _ = history.record(sasa_optax.metrics(state), loss=0.7)
          >>> history.status()
          'step 0  loss 0.7  learning rate 0.5  next test at step 8100'
        """
        return _display.status(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the newest record, `explain`, and the picture.

        The picture needs matplotlib, and is left out without it.
        """
        return _display.as_html(self)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows as CSV, a column for each name that occurs."""
        _records.write_csv(path, self.rows)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows as JSON lines, with null for what is not finite."""
        _records.write_jsonl(path, self.rows)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> "History":
        """Reads what `to_jsonl` or a `History` with this path wrote.

        A last line that a kill has cut off is left out.

        Raises:
          ValueError: if another line is no record. It names the file and the line.
        """
        history = cls()
        for row in _records.read(path):
            history._add(row)
        return history

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draws the loss, the rate, and why the rate moved, in panels above each other.

        The reason is each test with its interval, or progress beside its target. Lines
        across all panels mark drops, overshoots and brakes.

        Args:
          path: where to save the picture; its ending gives the format. Default None:
            the figure is only returned.

        Returns:
          A `matplotlib.figure.Figure`.

        Raises:
          ImportError: without matplotlib, which the extra ``plot`` brings.
          ValueError: if nothing has been recorded.
        """
        figure = _plot.draw(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
