"""Seeing why the rate dropped: metrics for any logger, and a record with a picture."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sasa_optax._controller import ControllerState
from sasa_optax._stationarity import TestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Row = dict[str, bool | int | float]


def _of_test(test: TestResult, name: str) -> dict[str, Any]:
    return {f"{name}_{field}": value for field, value in test._asdict().items()}


def _of_controller(state: ControllerState) -> dict[str, jax.Array]:
    fields = state._asdict()
    for name in ("window", "average", "centre"):
        del fields[name]
    fields |= _of_test(fields.pop("last_test"), "test")
    search = fields.pop("line_search")
    if search is not None:
        fields |= search._asdict()
        del fields["losses"]
        loss_test = fields.pop("loss_test")
        fields |= {} if loss_test is None else _of_test(loss_test, "loss_test")
    # Through asarray, since Flax NNX wraps each array of an optimizer's state.
    return {k: jnp.asarray(v) for k, v in fields.items() if v is not None}


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """The scalars to log: a flat dict of arrays of shape (), usable inside jit.

    Args:
      opt_state: the state of any optimizer with a controller of this library in it, at
        any depth: a chain, `optax.MultiSteps`, a Flax train state.

    Returns:
      ``step``, ``learning_rate`` (but for `reduce_on_stationarity`), ``scale``,
      ``num_drops``, ``num_nonfinite``, and the newest `TestResult` as ``test_step``,
      ``test_mean``, ``test_lower``, ``test_upper``, ``test_p_value``,
      ``test_num_samples``, ``test_stationary``. Of `ssls` and `salsa` also
      ``line_search_active``, ``step_size``, ``num_evaluations``; of `salsa` also the
      newest test of the losses, as ``loss_test_step`` and so on. Where there are
      several controllers, as under `optax.partition`, each key is led by the path to
      its controller and a slash.

    Raises:
      ValueError: if there is no controller in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> state = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
      >>> print(sasa_optax.metrics(state)["learning_rate"])
      0.5
    """

    def is_controller(node: Any) -> bool:
        return isinstance(node, ControllerState)

    leaves = jax.tree.leaves_with_path(opt_state, is_leaf=is_controller)
    found = [(path, node) for path, node in leaves if is_controller(node)]
    if not found:
        raise ValueError(
            "opt_state holds no controller of sasa_optax: pass the state that "
            f"`optimizer.init` or `optimizer.update` returned, got {type(opt_state)}."
        )
    if len(found) == 1:
        return _of_controller(found[0][1])
    return {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}/{key}": value
        for path, node in found
        for key, value in _of_controller(node).items()
    }


@dataclasses.dataclass(frozen=True)
class Drop:
    """A cut of the rate, and the test that made it; ``str()`` says it in a sentence.

    Attributes:
      step: the step at which the test fired; where the test was missed, because the
        records lie too far apart, the step of the record that shows the new rate.
      rate_name: "learning_rate", or "scale" for `reduce_on_stationarity`.
      old_rate: the rate before.
      new_rate: the rate after.
      test: what the test said, or None if it was missed.
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
        t = self.test
        return (
            f"step {self.step}: progress has stopped. Over the newest {t.num_samples} "
            f"samples the statistic averaged {t.mean:.3g}, interval [{t.lower:.3g}, "
            f"{t.upper:.3g}] (p = {t.p_value:.2g}); {rates}."
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
        found = f"step {self.step}: the line search has ended at learning rate"
        if self.test is None:
            return f"{found} {self.learning_rate:.3g}, by a drop."
        t = self.test
        return (
            f"{found} {self.learning_rate:.3g}: the newest {t.num_samples} losses fall "
            f"no more, slope {t.mean:.3g} in [{t.lower:.3g}, {t.upper:.3g}] "
            f"(p = {t.p_value:.2g})."
        )


def _to_python(name: str, value: Any) -> bool | int | float:
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    return array.item()


def _test_in(row: Row, prefix: str) -> TestResult:
    names = TestResult._fields
    return TestResult(**{name: row[f"{prefix}_{name}"] for name in names})


class History:
    """A host-side record of a run: what the controller did, and why.

    Feed it `metrics` every so many steps: at least every ``min_samples``, as no test
    comes sooner than that after a drop, so that the test which made it is then caught;
    but not at every step, as each call of `record` waits for the device.

    Attributes:
      rows: the records, each a dict of Python numbers.
      drops: the cuts of the rate seen so far, each a `Drop`.
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

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.drops: list[Drop] = []
        self.switch: Switch | None = None

    def record(self, metrics: Mapping[str, Any], **values: Any) -> Drop | Switch | None:
        """Adds a row, and returns what happened since the row before: a drop, else the
        end of the line search, else None.

        A row of the same or a later step than the new one is forgotten: a run that was
        restored from a checkpoint goes on from there.

        Args:
          metrics: what `sasa_optax.metrics` returned, of one controller; where an
            optimizer has several, give each part of its state a `History` of its own.
          **values: more scalars to keep, such as ``loss=loss``, which is plotted.

        Raises:
          ValueError: if ``metrics`` is not of one controller, or one of the values is
            no scalar or has the name of a metric.
        """
        if "num_drops" not in metrics:
            raise ValueError(
                "metrics must be those of one controller, with the key 'num_drops', "
                f"got the keys {sorted(metrics)}."
            )
        if clash := sorted(metrics.keys() & values.keys()):
            raise ValueError(f"values must not be named as metrics are, got {clash}.")
        fetched = jax.device_get({**metrics, **values})
        row = {name: _to_python(name, value) for name, value in fetched.items()}
        self.rows = [old for old in self.rows if old["step"] < row["step"]]
        last = self.rows[-1] if self.rows else None
        seen = last["step"] if last else 0
        self.drops = [old for old in self.drops if old.step <= seen]
        if self.switch is not None and self.switch.step > seen:
            self.switch = None
        drop = self._drop_between(last, row) if last else None
        switch = self._switch_between(last, row, drop) if last else None
        self.rows.append(row)
        if drop is not None:
            self.drops.append(drop)
        if switch is not None:
            self.switch = switch
        return drop or switch

    def _switch_between(self, last: Row, row: Row, drop: Drop | None) -> Switch | None:
        was_active = last.get("line_search_active", False)
        if not was_active or row["line_search_active"]:
            return None
        if not row["loss_test_stationary"]:
            assert drop is not None
            return Switch(drop.step, drop.old_rate, test=None)
        test = _test_in(row, "loss_test")
        rate = row["learning_rate"] if drop is None else drop.old_rate
        return Switch(int(row["loss_test_step"]), rate, test)

    def _drop_between(self, last: Row, row: Row) -> Drop | None:
        num_drops = row["num_drops"] - last["num_drops"]
        if num_drops == 0:
            return None
        rates = self.rate_name, last[self.rate_name], row[self.rate_name]
        # The next test after a drop finds the window refilled; until then the newest
        # test is the one that fired.
        if num_drops > 1 or not row["test_stationary"]:
            return Drop(int(row["step"]), *rates, test=None)
        return Drop(int(row["test_step"]), *rates, test=_test_in(row, "test"))

    @property
    def rate_name(self) -> str:
        """Which key is the rate: "learning_rate", or "scale" where there is none."""
        has_rate = self.rows and "learning_rate" in self.rows[0]
        return "learning_rate" if has_rate else "scale"

    def explain(self) -> str:
        """The end of the line search and every drop, a line each."""
        events = [self.switch, *self.drops] if self.switch else self.drops
        return "\n".join(map(str, events)) or "The rate has not dropped."

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows as CSV, a column for each name that occurs."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows as JSON lines, with null for what is not finite."""
        with open(path, "w") as file:
            for row in self.rows:
                finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
                file.write(json.dumps(finite) + "\n")

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> "History":
        """Reads what `to_jsonl` wrote, to go on with a run that was restarted."""
        history = cls()
        with open(path) as file:
            for line in file:
                row = json.loads(line)
                history.record(
                    {k: math.nan if v is None else v for k, v in row.items()}
                )
        return history

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draws the loss, the rate, and each test with its interval; drops marked.

        Args:
          path: where to save the picture; its ending gives the format. Default None:
            the figure is only returned.

        Returns:
          A `matplotlib.figure.Figure`.

        Raises:
          ImportError: without matplotlib, which the extra ``plot`` brings.
          ValueError: if nothing has been recorded.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "History.plot needs matplotlib: pip install 'sasa-optax[plot]'"
            ) from error
        if not self.rows:
            raise ValueError("History.plot needs rows: call History.record first.")
        panels = [self._plot_rate, self._plot_tests]
        if any("loss" in row for row in self.rows):
            panels.insert(0, self._plot_loss)
        figure = Figure(figsize=(8, 2.4 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            panel(ax)
            ax.grid(alpha=0.3)
            for drop in self.drops:
                ax.axvline(drop.step, color="tab:red", linestyle=":", linewidth=1)
            if end := self._end_of_search():
                ax.axvspan(0, end, color="tab:blue", alpha=0.08, linewidth=0)
        axes[-1].set_xlabel("step")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _column(self, name: str) -> tuple[list[float], list[float]]:
        pairs = [(row["step"], row[name]) for row in self.rows if name in row]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def _end_of_search(self) -> float:
        """The step up to which the rate was searched for; 0 without a search."""
        if not self.rows or "line_search_active" not in self.rows[-1]:
            return 0
        if self.switch is not None:
            return self.switch.step
        last = self.rows[-1]
        return last["step"] if last["line_search_active"] else 0

    def _plot_loss(self, ax: "Axes") -> None:
        steps, loss = self._column("loss")
        ax.plot(steps, loss, color="tab:blue", linewidth=1)
        ax.set_ylabel("loss")
        if min(loss) > 0:
            ax.set_yscale("log")

    def _plot_rate(self, ax: "Axes") -> None:
        # A step from each drop to the next, not a slope between two records.
        points = []
        for drop in self.drops:
            points += [(drop.step, drop.old_rate), (drop.step, drop.new_rate)]
        points += zip(*self._column(self.rate_name), strict=True)
        points.sort(key=lambda point: point[0])
        ax.plot(*zip(*points, strict=True), color="tab:green")
        for drop in self.drops:
            ax.annotate(
                f"{drop.new_rate:.2g}",
                (drop.step, drop.new_rate),
                textcoords="offset points",
                xytext=(4, 4),
            )
        ax.set_yscale("log")
        ax.set_ylabel(self.rate_name.replace("_", " "))
        if self._end_of_search():
            label = (
                "line search"
                if self.switch is None
                else (f"line search, {self.switch.learning_rate:.2g} found")
            )
            ax.fill_between([], [], color="tab:blue", alpha=0.15, label=label)
            ax.legend(loc="best", fontsize="small")

    def _plot_tests(self, ax: "Axes") -> None:
        tests = {row["test_step"]: row for row in self.rows if row["test_step"] > 0}
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_ylabel("test: mean, interval")
        if not tests:
            ax.text(0.5, 0.5, "no test yet", transform=ax.transAxes, ha="center")
            return
        fired = {drop.step for drop in self.drops}
        for step, row in tests.items():
            below = row["test_mean"] - row["test_lower"]
            above = row["test_upper"] - row["test_mean"]
            color, marker = ("tab:red", "v") if step in fired else ("tab:gray", ".")
            ax.errorbar(
                step,
                row["test_mean"],
                yerr=[[below], [above]],
                color=color,
                marker=marker,
                linewidth=1,
            )
        # Each drop shrinks the statistic, so a linear axis would show the first alone;
        # around zero it is linear as far as the narrowest interval that mattered.
        shown = [row for step, row in tests.items() if step in fired or not fired]
        widths = [row["test_upper"] - row["test_lower"] for row in shown]
        linear = min((width for width in widths if width > 0), default=1.0)
        ax.set_yscale("symlog", linthresh=linear)
        ax.plot([], [], "v", color="tab:red", label="fired: rate cut")
        ax.plot([], [], ".", color="tab:gray", label="still moving")
        ax.legend(loc="best", fontsize="small")
