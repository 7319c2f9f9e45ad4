"""Seeing why the rate moved: metrics for any logger, and a record with a picture."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sasa_optax import _loss_gate
from sasa_optax._adapt import AdaptOnProgressState
from sasa_optax._controller import ControllerState
from sasa_optax._progress import ProgressState
from sasa_optax._stationarity import TestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Row = dict[str, bool | int | float]
_Reporting = ControllerState | AdaptOnProgressState | ProgressState

_OF_ADAPTING = (
    "scale",
    "target",
    "sees_loss",
    "num_overshoots",
    "num_brakes",
    "num_nonfinite",
    "last_cut",
    "ceiling",
)
# Of an overshoot, and of a brake.
_COLORS = ("tab:orange", "tab:red")
_OF_LOSSES = ("fast", "slow", "first", "best")
_COUNTS = ("num_overshoots", "num_brakes", "num_nonfinite")


def _of_test(test: TestResult, name: str) -> dict[str, Any]:
    return {f"{name}_{field}": value for field, value in test._asdict().items()}


def _of_controller(state: ControllerState) -> dict[str, Any]:
    fields = state._asdict()
    for name in ("window", "statistic"):
        del fields[name]
    return fields | _of_test(fields.pop("last_test"), "test")


def _of_progress(state: ProgressState) -> dict[str, Any]:
    return {"step": state.average.num_averaged, "progress": state.progress}


def _of_adapting(state: AdaptOnProgressState) -> dict[str, Any]:
    losses = {f"loss_{name}": getattr(state.losses, name) for name in _OF_LOSSES}
    own = {name: getattr(state, name) for name in _OF_ADAPTING}
    return _of_progress(state.measured) | own | losses


def _of_state(state: _Reporting) -> dict[str, jax.Array]:
    if isinstance(state, ControllerState):
        fields = _of_controller(state)
    elif isinstance(state, AdaptOnProgressState):
        fields = _of_adapting(state)
    else:
        fields = _of_progress(state)
    # Through asarray, since Flax NNX wraps each array of an optimizer's state.
    return {k: jnp.asarray(v) for k, v in fields.items() if v is not None}


def _is_reporting(node: Any) -> bool:
    return isinstance(node, _Reporting)


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """The scalars to log: a flat dict of arrays of shape (), usable inside jit.

    Args:
      opt_state: the state of any optimizer with a controller, `adapt_on_progress` or
        `measure_progress` of this library in it, at any depth: a chain,
        `optax.MultiSteps`, a Flax train state.

    Returns:
      A controller gives ``step``, ``learning_rate`` (except for
      `reduce_on_stationarity`), ``scale``, ``num_drops``, ``num_nonfinite``, and the
      newest `TestResult` as ``test_step``, ``test_mean``, ``test_lower``,
      ``test_upper``, ``test_p_value``, ``test_num_samples``, ``test_stationary``.
      `ssls` and `salsa` add ``line_search_active``, ``step_size``,
      ``num_evaluations``. `salsa` also adds the newest test of the losses, as
      ``loss_test_step`` and so on.

      `adapt_on_progress` gives ``step``, ``progress``, ``scale``, ``target``,
      ``sees_loss``, ``num_overshoots``, ``num_brakes``, ``num_nonfinite``,
      ``last_cut``, ``ceiling``, and of the `LossState` ``loss_fast``, ``loss_slow``,
      ``loss_first``, ``loss_best``. ``ceiling`` is infinite before the first cut.

      `measure_progress` gives ``step`` and ``progress``. It adds only ``progress`` to
      the dict of a controller.

      Each key gets a prefix if two states give the same metric, as under
      `optax.partition`. The prefix is the path to the state and a slash.

    Raises:
      ValueError: if ``opt_state`` has none of these states in it.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> state = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
      >>> print(sasa_optax.metrics(state)["learning_rate"])
      0.5
    """
    leaves = jax.tree.leaves_with_path(opt_state, is_leaf=_is_reporting)
    found = [(path, _of_state(node)) for path, node in leaves if _is_reporting(node)]
    if not found:
        raise ValueError(
            "opt_state holds no controller and no progress of sasa_optax: pass the "
            "state that `optimizer.init` or `optimizer.update` returned, got "
            f"{type(opt_state)}."
        )
    names = [name for _, fields in found for name in fields if name != "step"]
    if len(names) == len(set(names)):
        # A controller has more to say than `measure_progress`, and its step wins.
        by_length = sorted((fields for _, fields in found), key=len)
        return {name: x for fields in by_length for name, x in fields.items()}
    return {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}/{name}": x
        for path, fields in found
        for name, x in fields.items()
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
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    return array.item()


def _legend_above(ax: "Axes") -> None:
    """Outside the panel, as its lines leave no corner free."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        fontsize="small",
        frameon=False,
        borderpad=0,
        columnspacing=1.5,
    )


def _shade(
    ax: "Axes",
    steps: list[float],
    progress: list[float],
    target: list[float],
    sees_loss: bool,
) -> None:
    """Says what progress asks of the scale, above its target and below."""
    rise = "the scale may rise" if sees_loss else "without a loss it stays"
    above = np.greater(progress, target)
    sides = [
        (above, "tab:green", f"moves on: {rise}"),
        (~above, "tab:brown", "moves in place: it falls"),
    ]
    for where, color, label in sides:
        ax.fill_between(
            steps,
            progress,
            target,
            where=where.tolist(),
            interpolate=True,
            color=color,
            alpha=0.2,
            linewidth=0,
            label=label,
        )


def _test_in(row: Row, prefix: str) -> TestResult:
    names = TestResult._fields
    return TestResult(**{name: row[f"{prefix}_{name}"] for name in names})


class History:
    """A host-side record of a run: how the rate moved, and why.

    Feed it `metrics` every so many steps: at least every ``min_samples``, as no test
    comes sooner than that after a drop, so that the test which made it is then caught;
    but not at every step, as each call of `record` waits for the device. Feed it the
    metrics of `adapt_on_progress` every 10 to 100 steps. Start with those of
    ``optimizer.init``: the first record is what the second is compared with.

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

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.drops: list[Drop] = []
        self.cuts: list[Cut] = []
        self.switch: Switch | None = None

    def record(
        self, metrics: Mapping[str, Any], **values: Any
    ) -> Drop | Cut | Switch | None:
        """Adds a row, and returns what happened since the row before: a drop, else a
        cut, else the end of the line search, else None.

        A row of the same or a later step than the new one is forgotten: a run that was
        restored from a checkpoint goes on from there.

        Args:
          metrics: what `sasa_optax.metrics` returned, without prefixes. Give each part
            of the state a `History` of its own if there are prefixes.
          **values: more scalars to keep, such as ``loss=loss``, which is plotted.

        Raises:
          ValueError: if ``metrics`` is not of one optimizer, or one of the values is
            no scalar or has the name of a metric.
        """
        if "step" not in metrics or not metrics.keys() & {"num_drops", "progress"}:
            raise ValueError(
                "metrics must be those of one optimizer, with the key 'step', and with "
                f"'num_drops' or 'progress', got the keys {sorted(metrics)}."
            )
        if clash := sorted(metrics.keys() & values.keys()):
            raise ValueError(f"values must not be named as metrics are, got {clash}.")
        fetched = jax.device_get({**metrics, **values})
        row = {name: _to_python(name, value) for name, value in fetched.items()}
        last = self._rewind(row["step"])
        self.rows.append(row)
        return None if last is None else self._compare(last, row)

    def _rewind(self, step: float) -> Row | None:
        """Forgets what is not before a step, and returns the newest row before it."""
        self.rows = [old for old in self.rows if old["step"] < step]
        last = self.rows[-1] if self.rows else None
        seen = last["step"] if last else 0
        self.drops = [old for old in self.drops if old.step <= seen]
        self.cuts = [old for old in self.cuts if old.step <= seen]
        if self.switch is not None and self.switch.step > seen:
            self.switch = None
        return last

    def _compare(self, last: Row, row: Row) -> Drop | Cut | Switch | None:
        """Keeps and returns what happened between two rows."""
        drop, cut = self._drop_between(last, row), self._cut_between(last, row)
        switch = self._switch_between(last, row, drop)
        if drop is not None:
            self.drops.append(drop)
        if cut is not None:
            self.cuts.append(cut)
        if switch is not None:
            self.switch = switch
        return drop or cut or switch

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
        num_drops = row.get("num_drops", 0) - last.get("num_drops", 0)
        if num_drops == 0:
            return None
        rates = self.rate_name, last[self.rate_name], row[self.rate_name]
        # The next test after a drop finds the window refilled; until then the newest
        # test is the one that fired.
        if num_drops > 1 or not row["test_stationary"]:
            return Drop(int(row["step"]), *rates, test=None)
        return Drop(int(row["test_step"]), *rates, test=_test_in(row, "test"))

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
        has_rate = self.rows and "learning_rate" in self.rows[0]
        return "learning_rate" if has_rate else "scale"

    def explain(self) -> str:
        """The end of the line search, every drop and every cut, a line each."""
        searched = [] if self.switch is None else [self.switch]
        events = [*searched, *self.drops, *self.cuts]
        events.sort(key=lambda event: event.step)
        is_adapting = self._has("num_brakes")
        nothing = "been cut" if is_adapting else "dropped"
        return "\n".join(map(str, events)) or f"The rate has not {nothing}."

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
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "History.plot needs matplotlib: pip install 'sasa-optax[plot]'"
            ) from error
        if not self.rows:
            raise ValueError("History.plot needs rows: call History.record first.")
        panels = self._panels()
        figure = Figure(figsize=(8, 2.4 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            panel(ax)
            ax.grid(alpha=0.3)
            self._mark(ax)
        axes[-1].set_xlabel("step")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _panels(self) -> list[Callable[["Axes"], None]]:
        panels = {
            "loss": self._plot_loss,
            "scale": self._plot_rate,
            "progress": self._plot_progress,
            "test_step": self._plot_tests,
        }
        return [panel for name, panel in panels.items() if self._has(name)]

    def _mark(self, ax: "Axes") -> None:
        """Lines where something happened, and a shade over the line search."""
        marks = [(drop.step, "tab:red") for drop in self.drops]
        marks += [(cut.step, _COLORS[cut.is_brake]) for cut in self.cuts]
        for step, color in marks:
            ax.axvline(step, color=color, linestyle=":", linewidth=1)
        if end := self._end_of_search():
            ax.axvspan(0, end, color="tab:blue", alpha=0.08, linewidth=0)

    def _has(self, name: str) -> bool:
        return any(name in row for row in self.rows)

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
        if self._has("loss_fast"):
            self._plot_limits(ax)
        if min(loss) > 0:
            ax.set_yscale("log")

    def _plot_limits(self, ax: "Axes") -> None:
        """The average that `adapt_on_progress` judges, and where it would cut."""
        # The first is zero until there are enough losses to judge.
        rows = [row for row in self.rows if row["sees_loss"] and row["loss_first"]]
        steps = [row["step"] for row in rows]
        best = np.asarray([row["loss_best"] for row in rows], float)
        gained = np.asarray([row["loss_first"] for row in rows], float) - best
        gained[gained <= 0] = np.nan
        fast = [row["loss_fast"] for row in rows]
        ax.plot(steps, fast, color="black", linewidth=1, label="average loss")
        shares = (_loss_gate._OVERSHOOT, _loss_gate._BRAKE)
        labels = ("overshoot, if surely above after a rise", "brake, if surely above")
        for share, label, color in zip(shares, labels, _COLORS, strict=True):
            limit = best + share * gained
            ax.plot(steps, limit, "--", color=color, linewidth=0.8, label=label)
        _legend_above(ax)

    def _plot_rate(self, ax: "Axes") -> None:
        jumps = [(drop.step, drop.old_rate, drop.new_rate) for drop in self.drops]
        jumps += [(cut.step, cut.old_scale, cut.new_scale) for cut in self.cuts]
        # A step down at each of them, not a slope between two records.
        points = [(float(step), rate) for step, *rates in jumps for rate in rates]
        points += zip(*self._column(self.rate_name), strict=True)
        points.sort(key=lambda point: point[0])
        ax.plot(*zip(*points, strict=True), color="tab:green")
        for step, _, rate in jumps:
            ax.annotate(
                f"{rate:.2g}",
                (step, rate),
                textcoords="offset points",
                xytext=(4, 4),
            )
        ax.set_yscale("log")
        name = self.rate_name.replace("_", " ")
        ax.set_ylabel("scale of the updates" if self._has("target") else name)
        self._explain_search(ax)
        self._explain_cuts(ax)

    def _explain_cuts(self, ax: "Axes") -> None:
        for is_brake in sorted({cut.is_brake for cut in self.cuts}):
            label = "brake" if is_brake else "overshoot"
            ax.plot([], [], ":", color=_COLORS[is_brake], label=label)
        if self.cuts:
            _legend_above(ax)

    def _explain_search(self, ax: "Axes") -> None:
        if self._end_of_search():
            label = (
                "line search"
                if self.switch is None
                else (f"line search, {self.switch.learning_rate:.2g} found")
            )
            ax.fill_between([], [], color="tab:blue", alpha=0.15, label=label)
            ax.legend(loc="best", fontsize="small")

    def _plot_progress(self, ax: "Axes") -> None:
        steps, progress = self._column("progress")
        ax.axhline(1, color="black", linewidth=0.8, alpha=0.4, label="random walk")
        ax.plot(steps, progress, color="tab:purple")
        if self._has("target"):
            target = self._column("target")[1]
            ax.plot(steps, target, "--", color="tab:gray", label="target")
            sees_loss = bool(self.rows[-1]["sees_loss"])
            _shade(ax, steps, progress, target, sees_loss)
        ax.set_yscale("log")
        ax.set_ylabel("progress")
        _legend_above(ax)

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
