"""In the training loops of others, with the real packages."""

import functools
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from optimizers import ALL, SERVOS, SMALL, decided

import sasa_optax

_environment = functools.partial(pytest.mark.environment, "5. Clients")
for_all = pytest.mark.parametrize("name", ALL)
_NUM_STEPS = 24
_IMAGES = jax.random.normal(jax.random.key(0), (32, 4))
_TARGETS = _IMAGES @ jnp.array([[1.0], [-2.0], [0.5], [0.0]]) + 0.3


def _make(name: str) -> Any:
    optimizer = ALL[name](**SMALL)
    if name == "reduce_on_stationarity":
        return optax.chain(optax.adam(1e-2), optimizer)
    return optax.chain(optax.scale(0.1), optimizer)


def _loss(outputs: jax.Array) -> jax.Array:
    return jnp.mean((outputs - _TARGETS) ** 2)


@functools.cache
def _plain_loop(name: str) -> tuple[Any, Any]:
    """The optimizer, and a step of the same training, compiled for all clients."""
    optimizer = _make(name)

    def loss(params: Any) -> jax.Array:
        return _loss(_IMAGES @ params["kernel"] + params["bias"])

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return optimizer, step


def _by_hand(name: str, kernel: jax.Array, bias: jax.Array) -> tuple[Any, Any]:
    """The parameters and the state after the same training in a plain loop."""
    optimizer, step = _plain_loop(name)
    params = {"bias": bias, "kernel": kernel}
    state = optimizer.init(params)
    for _ in range(_NUM_STEPS):
        params, state = step(params, state)
    return params, state


def _assert_as_by_hand(name: str, start: Any, end: Any, state: Any) -> None:
    params, expected = _by_hand(name, *start)
    np.testing.assert_allclose(end[0], params["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end[1], params["bias"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(end[0], start[0])
    one, other = map(decided, (state, expected))
    chex.assert_trees_all_close(one, other, rtol=1e-3, atol=1e-5)
    if name == "adapt_on_progress":
        assert bool(optax.tree.get(state, "sees_loss"))
        assert float(one["scale"]) != 1


@_environment("Flax NNX, `nnx.Optimizer`")
@for_all
def test_nnx(name: str) -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    assert model.bias is not None
    start = jnp.array(model.kernel[...]), jnp.array(model.bias[...])
    optimizer = nnx.Optimizer(model, _make(name), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        grad = nnx.value_and_grad(lambda model: _loss(model(_IMAGES)))
        value, grads = grad(model)
        optimizer.update(model, grads, value=value)

    for _ in range(_NUM_STEPS):
        step(model, optimizer)
    state = nnx.as_pure(optimizer.opt_state)
    _assert_as_by_hand(name, start, (model.kernel[...], model.bias[...]), state)


def test_the_injected_rate_is_seen_in_nnx() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    injected = optax.inject_hyperparams(optax.adamw)(1e-3)
    chain = optax.chain(injected, sasa_optax.adapt_on_progress())
    state = nnx.Optimizer(model, chain, wrt=nnx.Param).opt_state
    rate = sasa_optax.metrics(state)["learning_rate"]
    assert float(rate) == pytest.approx(1e-3)


@_environment("Flax Linen, `TrainState`")
@for_all
def test_linen(name: str) -> None:
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), _IMAGES)["params"]
    start = params["kernel"], params["bias"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=_make(name))

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(params: Any) -> jax.Array:
            return _loss(state.apply_fn({"params": params}, _IMAGES))

        value, grads = jax.value_and_grad(loss)(state.params)
        if name not in SERVOS:
            return state.apply_gradients(grads=grads)
        # `apply_gradients` passes no loss on, so its lines are written out.
        update = optax.with_extra_args_support(state.tx).update
        updates, opt_state = update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    for _ in range(_NUM_STEPS):
        state = step(state)
    assert int(state.step) == _NUM_STEPS
    end = state.params["kernel"], state.params["bias"]
    _assert_as_by_hand(name, start, end, state.opt_state)


@_environment("Equinox, `filter_jit` and `filter_grad`")
@for_all
def test_equinox(name: str) -> None:
    """Equinox puts None into its trees where a leaf is no array."""
    model = eqx.nn.MLP(4, 1, 1, depth=0, key=jax.random.key(0))
    linear = model.layers[0]
    start = linear.weight.T, linear.bias
    optimizer = _make(name)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grad = eqx.filter_value_and_grad(lambda m: _loss(jax.vmap(m)(_IMAGES)))
        value, grads = grad(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(grads, state, params, value=value)
        return eqx.apply_updates(model, updates), state

    for _ in range(_NUM_STEPS):
        model, state = step(model, state)
    linear = model.layers[0]
    _assert_as_by_hand(name, start, (linear.weight.T, linear.bias), state)


_DATA = 1.0 + 0.01 * jax.random.normal(jax.random.key(1), (50,))


def _model(data: jax.Array) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.sample("data", dist.Normal(mean, 0.1), obs=data)


# SVI passes gradients, parameters and the loss, but no function to search along.
def test_the_averaged_model_of_equinox_keeps_its_functions_and_integers() -> None:
    model = eqx.nn.MLP(4, 1, 8, depth=2, key=jax.random.key(0))
    optimizer = optax.chain(optax.sgd(0.5), sasa_optax.average_iterates())
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        params = eqx.apply_updates(params, updates)
    trained: Any = eqx.combine(params, model)
    averaged: Any = sasa_optax.averaged_params(state, trained)
    assert averaged.activation is model.activation
    assert averaged.depth is model.depth
    expected = sasa_optax.averaged_params(state)
    chex.assert_trees_all_equal(eqx.filter(averaged, eqx.is_inexact_array), expected)
    assert jnp.all(jax.vmap(averaged)(jnp.ones((2, 4))) != 0)


@_environment("NumPyro's SVI through `optax_to_numpyro`, the loss negative")
@pytest.mark.parametrize(
    "name",
    ["sasa", "sasa_plus", "scale_by_sasa_plus", "reduce_on_stationarity", "slope"],
)
def test_numpyro(name: str) -> None:
    window = sasa_optax.Window(
        min_samples=50, test_interval=10, leak_ratio=2, max_window=256
    )
    make = functools.partial(sasa_optax.slope, 1.0) if name == "slope" else ALL[name]
    ours = make(window=window)
    adam = [optax.scale_by_adam(), optax.scale(0.02)]
    before = [optax.adam(0.02)] if name == "reduce_on_stationarity" else adam
    optimizer = numpyro.optim.optax_to_numpyro(optax.chain(*before, ours))
    svi = SVI(_model, AutoNormal(_model), optimizer, Trace_ELBO())
    state = svi.init(jax.random.key(0), _DATA)
    update = jax.jit(svi.update)
    losses = []
    for _ in range(400):
        state, loss = update(state, _DATA)
        losses.append(float(loss))
    assert np.mean(losses[-50:]) < min(0, np.mean(losses[:10]))
    assert int(optax.tree.get(state.optim_state, "last_test").step) > 0


@_environment("NumPyro's SVI through `optax_to_numpyro`, the loss negative")
@pytest.mark.parametrize("name", SERVOS)
def test_numpyro_gives_the_loss(name: str) -> None:
    servo = getattr(sasa_optax, name)()
    optimizer = numpyro.optim.optax_to_numpyro(optax.chain(optax.adam(0.02), servo))
    svi = SVI(_model, AutoNormal(_model), optimizer, Trace_ELBO())
    state = svi.init(jax.random.key(0), _DATA)
    state, losses = jax.lax.scan(
        lambda state, _: svi.update(state, _DATA), state, length=1000
    )
    losses = np.asarray(losses)
    assert np.mean(losses[-50:]) < min(0, np.mean(losses[:10]))
    opt_state = optax.tree.get(state.optim_state, "measured", state.optim_state)
    assert int(optax.tree.get(opt_state, "num_averaged")) == 1000
    average = sasa_optax.averaged_params(state.optim_state)
    mean = optax.tree.get(average, "mean_auto_loc")
    assert float(mean) == pytest.approx(1.0, abs=0.02)
    if name == "adapt_on_progress":
        assert bool(optax.tree.get(state.optim_state, "sees_loss"))
        assert int(optax.tree.get(state.optim_state, "num_losses")) > 64
        assert int(optax.tree.get(state.optim_state, "num_brakes")) == 0
        assert float(optax.tree.get(state.optim_state, "scale")) != 1


@_environment(
    "NumPyro's SVI through `optax_to_numpyro`, the loss negative",
    "reduce_on_stationarity",
)
def test_reduce_on_stationarity_drops_in_numpyro_without_a_loss() -> None:
    """`optax.contrib.reduce_on_plateau` cannot do so: it needs the loss."""
    grads = params = jnp.ones(2)
    plateau = optax.contrib.reduce_on_plateau()
    with pytest.raises(TypeError, match="value"):
        plateau.update(grads, plateau.init(params), params)
    window = sasa_optax.Window(min_samples=50, test_interval=10)
    controller = sasa_optax.reduce_on_stationarity(window=window)
    optimizer = numpyro.optim.optax_to_numpyro(
        optax.chain(optax.adam(0.05), controller)
    )
    svi = SVI(_model, AutoNormal(_model), optimizer, Trace_ELBO())
    state = svi.init(jax.random.key(0), _DATA)
    state, _ = jax.lax.scan(
        lambda state, _: svi.update(state, _DATA), state, length=2000
    )
    assert int(optax.tree.get(state.optim_state, "num_drops")) > 0
    mean = svi.get_params(state)["mean_auto_loc"]
    assert float(mean) == pytest.approx(1.0, abs=0.02)
