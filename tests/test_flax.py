"""Inside Flax's own training loops, and the pages that show how."""

import pathlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import sasa_optax

_ROOT = pathlib.Path(__file__).parent.parent
_IMAGES = jax.random.normal(jax.random.key(0), (32, 4))
_TARGETS = _IMAGES @ jnp.array([[1.0], [-2.0], [0.5], [0.0]])
_WINDOW = sasa_optax.Window(min_samples=10, test_interval=5, leak_ratio=2)


def test_nnx_optimizer() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    transformation = sasa_optax.sasa_plus(0.5, window=_WINDOW)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> dict[str, jax.Array]:
        def loss(model: nnx.Linear) -> jax.Array:
            return jnp.mean((model(_IMAGES) - _TARGETS) ** 2)

        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)
        return sasa_optax.metrics(optimizer.opt_state)

    history = sasa_optax.History()
    for _ in range(40):
        history.record(step(model, optimizer))
    assert history.rows[-1]["step"] == 40
    assert history.rows[-1]["test_step"] == 40
    # Outside jit the arrays are wrapped by NNX.
    outside = sasa_optax.metrics(optimizer.opt_state)
    assert float(outside["test_mean"]) == history.rows[-1]["test_mean"]


def test_linen_train_state() -> None:
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), _IMAGES)["params"]
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optax.chain(
            optax.adamw(1e-2), sasa_optax.reduce_on_stationarity(window=_WINDOW)
        ),
    )

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(params: optax.Params) -> jax.Array:
            outputs = state.apply_fn({"params": params}, _IMAGES)
            return jnp.mean((outputs - _TARGETS) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(40):
        state = step(state)
    metrics = sasa_optax.metrics(state.opt_state)
    assert int(metrics["test_step"]) == 40


def test_linen_train_state_with_the_loss() -> None:
    """`apply_gradients` passes no loss on, so the step does its work, with the loss."""
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), _IMAGES)["params"]
    tx = optax.chain(optax.adam(1e-3), sasa_optax.adapt_on_progress())
    start = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params: Any) -> jax.Array:
        outputs = jnp.asarray(model.apply({"params": params}, _IMAGES))
        return jnp.mean((outputs - _TARGETS) ** 2)

    def step(state: TrainState, _: None) -> Any:
        value, grads = jax.value_and_grad(loss)(state.params)
        update = optax.with_extra_args_support(state.tx).update
        updates, opt_state = update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, value

    def plain_step(state: TrainState, _: None) -> Any:
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    seen, losses = jax.lax.scan(step, start, None, length=200)
    unseen, plain_losses = jax.lax.scan(plain_step, start, None, length=200)
    assert int(seen.step) == int(unseen.step) == 200
    with_loss = sasa_optax.metrics(seen.opt_state)
    without_loss = sasa_optax.metrics(unseen.opt_state)
    assert int(with_loss["step"]) == int(without_loss["step"]) == 200
    assert bool(with_loss["sees_loss"])
    assert not bool(without_loss["sees_loss"])
    # The rate is far too low, and only the loss lets it rise.
    assert float(with_loss["scale"]) > 3
    assert float(without_loss["scale"]) <= 1
    assert float(losses[-1]) < 0.6 * float(plain_losses[-1])


def test_nnx_optimizer_with_the_loss() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.adam(1e-3), sasa_optax.adapt_on_progress())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> dict[str, jax.Array]:
        def loss(model: nnx.Linear) -> jax.Array:
            return jnp.mean((model(_IMAGES) - _TARGETS) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value)
        return sasa_optax.metrics(optimizer.opt_state)

    history = sasa_optax.History()
    for _ in range(200):
        history.record(step(model, optimizer))
    last = history.rows[-1]
    assert last["step"] == 200
    assert last["sees_loss"] is True
    assert last["scale"] > 3
    assert last["num_brakes"] == last["num_nonfinite"] == 0
    # Outside jit the arrays are wrapped by NNX.
    outside = sasa_optax.metrics(optimizer.opt_state)
    assert {name: x.item() for name, x in outside.items()} == last


def test_nnx_optimizer_with_measured_progress() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.adam(1e-3), sasa_optax.measure_progress())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(40):
        optimizer.update(model, grads)
    metrics = sasa_optax.metrics(optimizer.opt_state)
    assert set(metrics) == {"step", "progress"}
    assert int(metrics["step"]) == 40
    # The updates follow a straight line.
    assert float(metrics["progress"]) > 1


def _names_of(page: str) -> dict[str, Any]:
    """What the code of a page of docs/ leaves behind."""
    text = (_ROOT / "docs" / page).read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    return _names_of("salsa.md")


@pytest.mark.parametrize("state", ["opt_state", "optimizer", "state"])
def test_the_guide_trains_with_the_line_search(
    guide: dict[str, Any], state: str
) -> None:
    # The guide trains a pytree of parameters, then NNX, then Linen.
    opt_state = getattr(guide[state], "opt_state", guide[state])
    metrics = sasa_optax.metrics(opt_state)
    assert int(metrics["step"]) == 60
    assert bool(metrics["line_search_active"])
    assert float(metrics["learning_rate"]) > 0.1
    # A search takes one or two evaluations, and one more if the loss is not given.
    given = 0 if state == "opt_state" else 1
    per_step = int(metrics["num_evaluations"]) / 60
    assert given + 1 <= per_step <= given + 2


def test_the_search_of_the_guide_leaves_batch_norm_and_dropout_alone(
    guide: dict[str, Any],
) -> None:
    images, labels = guide["images"][:32], guide["labels"][:32]
    model = guide["Model"](nnx.Rngs(0))
    # The step of the guide has been compiled for this transformation.
    optimizer = nnx.Optimizer(model, guide["optimizer"].tx, wrt=nnx.Param)
    trained = nnx.clone(model)
    trained.train()
    trained(images)
    guide["nnx_step"](model, optimizer, images, labels)
    # There was one forward pass in training mode, and the search left no trace.
    np.testing.assert_allclose(model.norm.mean[...], trained.norm.mean[...], rtol=1e-6)
    assert not model.dropout.deterministic


# The averaged model.

_AVERAGED = optax.chain(optax.sgd(1.0), sasa_optax.average_iterates())
# After one step from x = 1 to x = 0.
_AFTER_ONE = 1 - 1 / 32


def test_from_flax_nnx() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, _AVERAGED, wrt=nnx.Param)
    start = nnx.clone(model)

    @nnx.jit
    def train_step(model: Any, optimizer: Any) -> Any:
        params = nnx.state(model, nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.ones_like, params))
        return sasa_optax.averaged_params(
            optimizer.opt_state, nnx.state(model, nnx.Param)
        )

    inside = train_step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    average = sasa_optax.averaged_params(optimizer.opt_state, params)
    chex.assert_trees_all_equal(inside, average)
    chex.assert_trees_all_equal_shapes_and_dtypes(average, params)
    # `nnx.update` takes the average as parameters.
    averaged = nnx.clone(model)
    nnx.update(averaged, average)
    expected = _AFTER_ONE * start.kernel[...] + (1 - _AFTER_ONE) * model.kernel[...]
    np.testing.assert_allclose(
        averaged.kernel[...].astype(np.float32), expected.astype(np.float32), rtol=1e-2
    )


def test_from_flax_linen() -> None:
    model = linen.Dense(3)
    variables = model.init(jax.random.key(0), jnp.ones(2))
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=_AVERAGED
    )
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    for given in (None, state.params):
        average = sasa_optax.averaged_params(state.opt_state, given)
        chex.assert_trees_all_equal_shapes_and_dtypes(average, state.params)
        chex.assert_trees_all_close(
            average,
            jax.tree.map(lambda x: x - (1 - _AFTER_ONE), variables["params"]),
            rtol=1e-5,
        )


# The code of docs/averaging.md.


@pytest.fixture(scope="module")
def averaging() -> dict[str, Any]:
    return _names_of("averaging.md")


def _running_mean(old: jax.Array, activations: jax.Array) -> np.ndarray:
    """The old mean, moved batch by batch towards the averaged model's activations."""
    mean = np.asarray(old)
    for batch in np.asarray(activations):
        mean = 0.9 * mean + 0.1 * batch.mean(axis=0)
    assert np.abs(mean - old).max() > 0.01
    return mean


def test_the_guide_renews_batch_norm_in_nnx(averaging: dict[str, Any]) -> None:
    model, average, images = (
        averaging["model"],
        averaging["average"],
        averaging["images"],
    )
    params = nnx.state(model, nnx.Param)
    expected = sasa_optax.averaged_params(averaging["nnx_optimizer"].opt_state, params)
    chex.assert_trees_all_equal(
        jax.tree.leaves(nnx.state(average, nnx.Param)), jax.tree.leaves(expected)
    )
    running = _running_mean(model.norm.mean[...], average.hidden(images))
    np.testing.assert_allclose(average.norm.mean[...], running, rtol=1e-4, atol=1e-5)
    # What is trained has not been touched.
    before = model.norm.mean[...]
    averaging["averaged_model"](model, averaging["nnx_optimizer"], images[:3])
    np.testing.assert_array_equal(model.norm.mean[...], before)
    assert not model.norm.use_running_average


def test_the_guide_renews_batch_norm_in_linen(averaging: dict[str, Any]) -> None:
    state, variables, images = (
        averaging["state"],
        averaging["variables"],
        averaging["images"],
    )
    expected = sasa_optax.averaged_params(state.opt_state)
    chex.assert_trees_all_equal(variables["params"], expected)
    layer = variables["params"]["Dense_0"]
    old = state.batch_stats["BatchNorm_0"]["mean"]
    running = _running_mean(old, images @ layer["kernel"] + layer["bias"])
    actual = variables["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(actual, running, rtol=1e-4, atol=1e-5)


def test_the_guide_constrains_the_average_in_numpyro(averaging: dict[str, Any]) -> None:
    data, params = np.asarray(averaging["data"]), averaging["guide_params"]
    assert params.keys() == averaging["svi"].get_params(averaging["svi_state"]).keys()
    # Under so wide a prior, the posterior is that of the likelihood alone.
    assert params["mean_auto_loc"] == pytest.approx(data.mean(), abs=0.01)
    error = data.std() / np.sqrt(data.size)
    assert params["mean_auto_scale"] == pytest.approx(error, rel=0.2)
    assert averaging["medians"]["scale"] == pytest.approx(data.std(), rel=0.05)
    unconstrained = sasa_optax.averaged_params(averaging["svi_state"].optim_state)
    assert optax.tree.get(unconstrained, "mean_auto_scale") < 0
