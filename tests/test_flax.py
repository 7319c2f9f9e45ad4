"""Inside Flax's own training loops, and the example as a user runs it."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState

import sasa_optax

_IMAGES = jax.random.normal(jax.random.key(0), (32, 4))
_TARGETS = _IMAGES @ jnp.array([[1.0], [-2.0], [0.5], [0.0]])
_ARGUMENTS = {"min_samples": 10, "test_interval": 5, "leak_ratio": 2}


def test_nnx_optimizer() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    transformation = sasa_optax.sasa_plus(0.5, **_ARGUMENTS)
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
            optax.adamw(1e-2), sasa_optax.reduce_on_stationarity(**_ARGUMENTS)
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


def test_the_digits_example_runs(tmp_path: pathlib.Path) -> None:
    example = pathlib.Path(__file__).parent.parent / "examples" / "digits.py"
    run = subprocess.run(
        [sys.executable, example, "--epochs=10", "--seeds=1", f"--out={tmp_path}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "SASA+ from 1" in run.stdout
    assert (tmp_path / "digits.png").exists()
    history = sasa_optax.History.from_jsonl(tmp_path / "digits.jsonl")
    assert history.rows[-1]["step"] == 175
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] / 3
