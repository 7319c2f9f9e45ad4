"""Each optimizer decides and moves the same, whatever it runs in.

What it must equal is a plain loop over a compiled step, which the golden traces and the
other tests compare with independent sources.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from optimizers import (
    ALL,
    OPTIMIZERS,
    PARAMS,
    PLAIN,
    SERVOS,
    SMALL,
    decided,
    small,
    without_momentum,
)

import sasa_optax

for_all = pytest.mark.parametrize("name", ALL)
_environment = pytest.mark.environment
_transformed = functools.partial(_environment, "1. JAX's transformations and modes")
_typed = functools.partial(_environment, "2. Types and trees")
_wrapped = functools.partial(_environment, "4. optax")
_faulty = functools.partial(_environment, "7. Faults")

_NOISE = 0.1 * np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
_START = np.ones(2, np.float32)
_COUNTS = {jnp.dtype(jnp.int32), jnp.dtype(bool)}


def _grads(noise: Any, params: Any) -> Any:
    """Of a quadratic, with noise, so that the dynamics become stationary."""
    return noise + 0.1 * params


def _run(
    update: Callable[..., Any], params: Any, state: Any, noise: Any
) -> tuple[Any, Any]:
    for row in noise:
        updates, state = update(_grads(row, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def _expected(name: str, num_steps: int = len(_NOISE)) -> tuple[Any, Any]:
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    return _run(update, params, optimizer.init(params), _NOISE[:num_steps])


def _assert_as_expected(
    actual: tuple[Any, Any], name: str, num_steps: int = len(_NOISE)
) -> None:
    # The leaves, as a mask leaves others out of the tree.
    leaves = jax.tree.leaves(actual)
    expected = jax.tree.leaves(_expected(name, num_steps))
    chex.assert_trees_all_close(leaves, expected, rtol=1e-4, atol=1e-5)
    counts = [[x for x in tree if x.dtype in _COUNTS] for tree in (leaves, expected)]
    chex.assert_trees_all_equal(*counts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_expected_comes_from_tests_that_ran(name: str) -> None:
    _, state = _expected(name)
    assert int(optax.tree.get(state, "last_test").at_step) > 0


@pytest.mark.parametrize("num_steps", [8, len(_NOISE)])
def test_what_is_expected_comes_from_rates_that_rose_and_were_cut(
    num_steps: int,
) -> None:
    decisions = decided(_expected("adapt_on_progress", num_steps)[1])
    assert int(decisions["num_overshoots"]) == 1
    assert int(decisions["num_brakes"]) == 1
    # And has risen again, up to what a ceiling allows.
    assert int(decisions["last_rise"]) == (0 if num_steps == 8 else 200 + num_steps)
    for name in SERVOS:
        assert float(decided(_expected(name)[1])["progress"]) > 1.5


# JAX's transformations and modes.


@_transformed("no jit; `jax_debug_nans`")
@for_all
def test_without_jit_no_operation_makes_nan(name: str) -> None:
    optimizer, _ = small(name)
    params = jnp.asarray(_START)
    with jax.disable_jit(), jax.debug_nans(True):
        actual = _run(optimizer.update, params, optimizer.init(params), _NOISE[:6])
    _assert_as_expected(actual, name, 6)


@_transformed("`lax.scan`")
@for_all
def test_scan(name: str) -> None:
    optimizer, _ = small(name)

    def step(carry: Any, noise: jax.Array) -> Any:
        return _run(optimizer.update, *carry, noise[None]), None

    params = jnp.asarray(_START)
    scanned, _ = jax.jit(functools.partial(jax.lax.scan, step))(
        (params, optimizer.init(params)), _NOISE
    )
    _assert_as_expected(scanned, name)


@_transformed("`vmap` over a population, each member deciding alone")
@for_all
def test_vmap(name: str) -> None:
    optimizer, update = small(name)
    noise = 0.1 * jax.random.normal(jax.random.key(1), (24, 3, 2))
    params = jnp.stack([jnp.asarray(_START) * k for k in (1, 2, 3)])
    step = jax.jit(jax.vmap(optimizer.update))
    population = _run(step, params, jax.vmap(optimizer.init)(params), noise)
    for member in range(3):
        alone = _run(
            update, params[member], optimizer.init(params[member]), noise[:, member]
        )
        one = jax.tree.map(lambda x, member=member: x[member], population)
        chex.assert_trees_all_close(one, alone, rtol=1e-4, atol=1e-5)


@_transformed("`grad` through an update")
@_transformed("`jax.checkpoint` (remat)")
@for_all
def test_gradients_pass_through(name: str) -> None:
    optimizer, _ = small(name)

    def after_two_steps(params: jax.Array) -> jax.Array:
        params, _ = _run(optimizer.update, params, optimizer.init(params), _NOISE[:2])
        return jnp.sum(params**2)

    x = jnp.asarray(_START)
    for function in (after_two_steps, jax.checkpoint(after_two_steps)):
        check_grads(
            jax.jit(function), (x,), order=1, modes=["rev"], atol=0.05, rtol=0.05
        )


@_transformed("donated parameters and state")
@_transformed("compiled ahead of time")
@_transformed("one compilation for all steps")
@for_all
def test_donated_and_compiled_ahead_of_time(name: str) -> None:
    optimizer, _ = small(name)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, noise: Any) -> Any:
        return _run(optimizer.update, params, state, noise[None])

    params = jnp.array(_START)
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    compiled = step.lower(params, state, _NOISE[0]).compile()
    for noise in _NOISE:
        old = params, optax.tree.get(state, "window"), optax.tree.get(state, "trace")
        # It takes exactly the types and shapes that it was compiled for.
        params, state = compiled(params, state, noise)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    _assert_as_expected((params, state), name)


@_transformed("donated parameters and state")
@for_all
def test_every_leaf_has_a_buffer_of_its_own(name: str) -> None:
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    for init in (ALL[name]().init, jax.jit(ALL[name]().init)):
        leaves = jax.tree.leaves((params, init(params)))
        pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
        assert len(pointers) == len(leaves)


@_transformed("`jax_enable_x64`")
@for_all
def test_double_precision(name: str, x64: None) -> None:
    optimizer = ALL[name](**SMALL)
    params = jnp.asarray(_START, jnp.float64)
    state = optimizer.init(params)
    params, state = _run(jax.jit(optimizer.update), params, state, _NOISE[:8])
    types = {x.dtype for x in jax.tree.leaves((params, state))}
    assert types - _COUNTS == {jnp.dtype(jnp.float64)}
    _assert_as_expected((params, state), name, 8)


@_transformed("`jax_enable_x64`")
@for_all
def test_single_precision_stays_where_double_is_enabled(name: str, x64: None) -> None:
    optimizer = ALL[name](**SMALL)
    params = jnp.asarray(_START, jnp.float32)
    types = jax.eval_shape(optimizer.update, params, optimizer.init(params), params)
    assert jnp.float64 not in {x.dtype for x in jax.tree.leaves(types)}


@_transformed('`jax_numpy_dtype_promotion="strict"`')
@for_all
def test_strict_promotion(name: str) -> None:
    optimizer = ALL[name](**SMALL)
    with jax.numpy_dtype_promotion("strict"):
        params = jnp.asarray(_START)
        jax.eval_shape(optimizer.update, params, optimizer.init(params), params)


# Types and trees.

_TREES: dict[str, Any] = {
    "float16": np.ones(2, np.float16),
    "bfloat16": np.ones(2, jnp.bfloat16),
    "float32": np.ones(2, np.float32),
    "float64": np.ones(2, np.float64),
    "complex64": np.ones(2, np.complex64),
    "mixed": [np.ones(2, t) for t in (np.float16, jnp.bfloat16, np.float32)],
    "scalars": {"a": np.float32(1.0), "b": np.ones((), np.float32)},
    "empty leaves": {"a": np.ones((0, 3), np.float32), "b": np.ones(2, np.float32)},
    "`None` leaves": {"a": None, "b": np.ones(2, np.float32)},
}


def _all_kinds(test: Callable[..., None]) -> Callable[..., None]:
    cases = [
        pytest.param(name, kind, marks=_typed(kind)) for name in ALL for kind in _TREES
    ]
    return pytest.mark.parametrize(("name", "kind"), cases)(test)


@_all_kinds
def test_types_and_shapes_never_change(name: str, kind: str, x64: None) -> None:
    optimizer = ALL[name](**SMALL)
    params = jax.tree.map(jnp.asarray, _TREES[kind])
    state = optimizer.init(params)
    types = jax.eval_shape(optimizer.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(types, (params, state))
    assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(state))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(types[1]))
    wide = jnp.float64 if kind == "float64" else jnp.float32
    if name not in PLAIN:
        leaves = jax.tree.leaves(without_momentum(state))
        # Averages of complex numbers are complex.
        assert {x.real.dtype for x in leaves} - _COUNTS == {jnp.dtype(wide)}


@_typed("mixed")
@_typed("empty leaves")
@_typed("`None` leaves")
@_typed("scalars")
@for_all
def test_a_tree_of_everything(name: str) -> None:
    """It moves as the same numbers in one array of single precision."""
    optimizer, update = small(name)
    start = jnp.ones(8)
    grads = 0.25 * jnp.arange(-3.0, 5.0)
    params = {
        "half": jnp.ones(2, jnp.float16),
        "brain": jnp.ones(2, jnp.bfloat16),
        "single": jnp.ones((1, 2)),
        "complex": jnp.ones(1, jnp.complex64) * (1 + 1j),
        "empty": jnp.ones((0, 3)),
        "none": None,
    }
    mixed = {
        "half": grads[:2].astype(jnp.float16),
        "brain": grads[2:4].astype(jnp.bfloat16),
        "single": grads[None, 4:6],
        "complex": grads[6:7] + 1j * grads[7:8],
        "empty": jnp.ones((0, 3)),
        "none": None,
    }
    whole = update(grads, optimizer.init(start), start)
    parts = jax.jit(optimizer.update)(mixed, optimizer.init(params), params)
    flat = [jnp.asarray(parts[0][key]) for key in ("half", "brain", "single")]
    joined = [x.ravel().astype(jnp.float32) for x in flat]
    z = parts[0]["complex"]
    joined = jnp.concatenate([*joined, z.real, z.imag])
    np.testing.assert_allclose(joined, whole[0], rtol=0.01)
    for field in ("window", "num_nonfinite"):
        one, other = (optax.tree.get(state, field) for _, state in (whole, parts))
        chex.assert_trees_all_close(one, other, rtol=0.02)
    one, other = (decided(state) for _, state in (whole, parts))
    chex.assert_trees_all_close(one, other, rtol=0.02)


@_typed("complex64")
@for_all
def test_a_complex_number_is_two_real_ones(name: str) -> None:
    optimizer, _ = small(name)
    params = jnp.asarray(_START)
    noise = _NOISE[:8, :1] + 1j * _NOISE[:8, 1:]
    z = params[:1] + 1j * params[1:]
    z, state = _run(jax.jit(optimizer.update), z, optimizer.init(z), noise)
    pair, expected = _expected(name, 8)
    np.testing.assert_allclose([z[0].real, z[0].imag], pair, rtol=1e-4)
    chex.assert_trees_all_close(decided(state), decided(expected), rtol=1e-3, atol=1e-6)


@_typed("parameters committed to a device")
@for_all
def test_committed_parameters(name: str) -> None:
    device = jax.devices()[-1]
    optimizer, update = small(name)
    params = jax.device_put(_START, device)
    actual = _run(update, params, optimizer.init(params), _NOISE)
    assert {d for x in jax.tree.leaves(actual) for d in x.devices()} == {device}
    _assert_as_expected(actual, name)


# optax.


@_wrapped("`chain`")
@_wrapped("`named_chain`")
@_wrapped("`tree.get`")
@for_all
def test_chains(name: str) -> None:
    params = jnp.asarray(_START)
    clip = optax.clip_by_global_norm(1e6)
    optimizer = optax.chain(clip, optax.named_chain(("it", small(name)[0])))
    params, state = _run(
        jax.jit(optimizer.update), params, optimizer.init(params), _NOISE
    )
    _assert_as_expected((params, state[1]["it"]), name)
    if name not in PLAIN and name != "measure_progress":
        scale = optax.tree.get(state, "scale")
        expected = float(optax.tree.get(_expected(name)[1], "scale"))
        # Where it is not a power of the factor, rounding counts.
        assert float(scale) == pytest.approx(expected, rel=1e-6 * (name in SERVOS))


@_wrapped("`MultiSteps`: one step in k, on the mean gradient")
@for_all
def test_multi_steps(name: str) -> None:
    optimizer = optax.MultiSteps(small(name)[0], every_k_schedule=2)
    params = jnp.asarray(_START)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for noise in _NOISE[:12]:
        # Twice the same, less and more.
        for part in (0.5, 1.5):
            updates, state = update(part * _grads(noise, params), state, params)
            moved = optax.apply_updates(params, updates)
            if part == 0.5:
                chex.assert_trees_all_equal(moved, params)
        params = moved
    _assert_as_expected((params, state.inner_opt_state), name, 12)


# A line search under these would call `value_fn` with the masked parameters.
for_all_without_search = pytest.mark.parametrize(
    "name", [name for name in ALL if "salsa" not in name and "ssls" not in name]
)


@_wrapped("`masked`")
@for_all_without_search
def test_masked(name: str) -> None:
    mask = {"a": True, "b": False}
    optimizer = optax.masked(small(name)[0], mask)
    params = {"a": jnp.asarray(_START), "b": jnp.ones(3)}
    noise = [{"a": row, "b": np.zeros(3, np.float32)} for row in _NOISE]
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for row in noise:
        grads = {"a": _grads(row["a"], params["a"]), "b": row["b"]}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    _assert_as_expected((params["a"], state.inner_state), name)


@_wrapped("`partition`, each group deciding alone")
@for_all_without_search
def test_partition(name: str) -> None:
    groups = {"ours": small(name)[0], "frozen": optax.set_to_zero()}
    optimizer = optax.partition(groups, {"a": "ours", "b": "frozen"})
    params = {"a": jnp.asarray(_START), "b": jnp.ones(3)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for noise in _NOISE:
        grads = {"a": _grads(noise, params["a"]), "b": jnp.ones(3)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    inner = state.inner_states["ours"].inner_state
    _assert_as_expected((params["a"], inner), name)
    np.testing.assert_array_equal(params["b"], 1.0)


@_wrapped("`transforms.freeze`, after it")
@for_all
def test_frozen(name: str) -> None:
    """A frozen parameter does not move, and does not keep the rest from deciding."""
    mask = {"a": False, "b": True}
    frozen = optax.transforms.freeze(mask)
    optimizer = optax.chain(frozen, small(name)[0], frozen)
    params = {"a": jnp.asarray(_START), "b": jnp.zeros(3)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for noise in _NOISE:
        grads = {"a": _grads(noise, params["a"]), "b": jnp.ones(3)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["b"], 0.0)
    expected = _expected(name)
    np.testing.assert_allclose(params["a"], expected[0], rtol=1e-4)
    one, other = (decided(x) for x in (state[1], expected[1]))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


@_wrapped("`lookahead`, around it")
@for_all
def test_lookahead(name: str) -> None:
    """The fast parameters are its own; slow ones that go all the way change nothing."""
    optimizer = optax.lookahead(small(name)[0], sync_period=4, slow_step_size=1.0)
    params = optax.LookaheadParams.init_synced(jnp.asarray(_START))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for noise in _NOISE:
        updates, state = update(_grads(noise, params.fast), state, params)
        params = optax.apply_updates(params, updates)
    _assert_as_expected((params.slow, state.fast_state), name)


@_wrapped("`tree.map_params`")
@for_all
def test_map_params(name: str) -> None:
    """It tells what is like the parameters, momentum and averages, from all else."""
    optimizer, _ = small(name)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    state = optimizer.init(params)
    doubled = optax.tree.map_params(
        optimizer, lambda x: x + 1, state, transform_non_params=lambda x: x
    )
    like_params = {"trace", "averaged"}

    def wanted(path: Any, x: jax.Array) -> jax.Array:
        names = {getattr(key, "name", None) for key in path}
        return x + 1 if names & like_params else x

    chex.assert_trees_all_equal(doubled, jax.tree.map_with_path(wanted, state))


@_wrapped("`apply_if_finite`: bad steps leave no trace")
@_faulty("NaN and Inf gradients under `apply_if_finite`: exact recovery")
@for_all
def test_recovery_is_exact_after_apply_if_finite(name: str) -> None:
    optimizer = optax.apply_if_finite(small(name)[0], max_consecutive_errors=5)
    bad = np.full((3, 2), np.nan, np.float32)
    bad[1] = np.inf
    noise = np.concatenate([_NOISE[:8], bad, _NOISE[8:], bad[:1]])
    params = jnp.asarray(_START)
    update = jax.jit(optimizer.update)
    params, state = _run(update, params, optimizer.init(params), noise)
    assert int(state.total_notfinite) == 4
    start = jnp.asarray(_START)
    good = _run(update, start, optimizer.init(start), _NOISE)
    chex.assert_trees_all_equal(
        (params, state.inner_state), (good[0], good[1].inner_state)
    )
    _assert_as_expected((params, state.inner_state), name)


# Of optax's own all but schedule_free, which finds its average in the parameters as if
# they had moved by all of its last update, and differentially private SGD, which wants
# the gradients of single examples.
_OTHERS = [
    *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw"),
    *("adamw", "adan", "amsgrad", "fromage", "lamb", "lars", "lbfgs", "lion", "nadam"),
    *("nadamw", "noisy_sgd", "novograd", "optimistic_adam_v2", "polyak_sgd", "radam"),
    *("optimistic_gradient_descent", "rmsprop", "rprop", "sgd", "sign_sgd", "signum"),
    *("sm3", "yogi", "acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "dog"),
    *("dowg", "galore", "madgrad", "mechanize", "momo", "momo_adam", "muon", "prodigy"),
    *("sam", "simplified_ademamix", "sophia"),
]
_ARGUMENTS: dict[str, Any] = {
    "mechanize": {"base_optimizer": optax.sgd(0.1)},
    "noisy_sgd": {"learning_rate": 0.1, "key": 0},
    "sam": {"optimizer": optax.sgd(0.1), "adv_optimizer": optax.sgd(0.05)},
}


def _other(name: str) -> optax.GradientTransformationExtraArgs:
    make = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if make is None:
        pytest.skip(f"this optax has no {name}")
    parameters = inspect.signature(make).parameters
    rate = {"learning_rate": 0.1} if "learning_rate" in parameters else {}
    return optax.with_extra_args_support(make(**_ARGUMENTS.get(name, rate)))


def _never(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    return sasa_optax.TestResult(mean=samples.values[0], stationary=False)


def _loss_for_others(params: Any) -> jax.Array:
    return sum(jnp.sum(jnp.sin(x) + x**2) for x in jax.tree.leaves(params))


def _start_for_others() -> Any:
    return {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.ones(4)}


def _moved(optimizer: Any, other: str, params: Any, state: Any) -> Any:
    """The updates of an optimizer in which one of optax's stands, and its state."""
    value, grads = jax.value_and_grad(_loss_for_others)(params)
    extra = {"value": value, "grad": grads, "value_fn": _loss_for_others}
    of_sophia = extra | {"obj_fn": _loss_for_others}
    extra = {"sam": {}, "sophia": of_sophia}.get(other, extra)
    return optimizer.update(grads, state, params, **extra)


for_all_others = pytest.mark.parametrize("other", _OTHERS)
_after_others = functools.partial(
    _wrapped, "each of optax's and optax.contrib's optimizers"
)


@_after_others("reduce_on_stationarity")
@for_all_others
def test_reduce_on_stationarity_after_any_optimizer(other: str) -> None:
    """The statistic is the change of the squared norm; the scale that of the step."""
    window = sasa_optax.Window(min_samples=4, max_window=8)
    controller = sasa_optax.reduce_on_stationarity(test=_never, window=window)
    optimizer = optax.chain(_other(other), controller)
    params = _start_for_others()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = _moved(optimizer, other, params, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    norms = [optax.tree.norm(params, squared=True)]
    for _ in range(5):
        params, state = step(params, state)
        norms.append(optax.tree.norm(params, squared=True))
    samples = state[-1].window.buffer[0, :5]
    expected = -np.diff(np.asarray(norms)) / 2
    np.testing.assert_allclose(samples, expected, rtol=1e-3, atol=1e-4)


def _progress_of(
    iterates: list[Any], updates: list[Any], momentum: float, age: int
) -> list[float]:
    """After each step, in NumPy, by the formulas of `measure_progress`.

    The average is x_0 at first, ``age`` steps before which nothing moved.
    """
    factor = (1 + momentum) / (1 - momentum)
    centres = [np.asarray(x, np.float64) for x in jax.tree.leaves(iterates[0])]
    walks = [0.0 for _ in centres]
    progress = []
    for k, (x, u) in enumerate(zip(iterates[1:], updates, strict=True), age + 1):
        horizon = max(32, k / 8)
        ratios = []
        leaves = zip(*map(jax.tree.leaves, (x, u)), strict=True)
        for i, pair in enumerate(leaves):
            new, move = (np.asarray(z, np.float64) for z in pair)
            centres[i] = centres[i] + (new - centres[i]) / horizon
            walks[i] = (1 - 1 / horizon) ** 2 * (walks[i] + factor * np.sum(move**2))
            if walks[i] > 0:
                ratios.append(np.sum((new - centres[i]) ** 2) / walks[i])
        progress.append(float(np.mean(ratios)) if ratios else 1.0)
    return progress


# Of any age, and with momentum or without.
@_after_others(*SERVOS)
@for_all_others
def test_progress_after_any_optimizer(other: str) -> None:
    """Progress is that of the iterates; the step that of the optimizer, scaled."""
    momentum, age = (0.9, 0) if len(other) % 2 else (0.5, 1000)
    servo = sasa_optax.adapt_on_progress(momentum)
    inner = _other(other)
    optimizer = optax.chain(inner, servo, sasa_optax.measure_progress(momentum))
    params = _start_for_others()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        wanted, _ = _moved(inner, other, params, state[0])
        updates, state = _moved(optimizer, other, params, state)
        return optax.apply_updates(params, updates), state, updates, wanted

    first, *ours = optimizer.init(params)
    ours = optax.tree.set(ours, num_averaged=jnp.full((), age, jnp.int32))
    ours = optax.tree.set(ours, scale=jnp.full((), 0.5))
    state = (first, *ours)
    iterates, moves = [params], []
    for _ in range(6):
        scale = float(state[1].scale)
        params, state, updates, wanted = step(params, state)
        wanted = jax.tree.map(lambda u, s=scale: s * u, wanted)
        chex.assert_trees_all_close(updates, wanted, rtol=1e-4, atol=1e-7)
        iterates.append(params)
        moves.append(updates)
        *_, expected = _progress_of(iterates, moves, momentum, age)
        # Of steps that are tiny beside the parameters much is rounded off.
        length = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(moves))
        rel = 1e-3 + 1e-6 / max(length, 1e-6)
        for progress in (state[1].measured.progress, state[2].progress):
            assert float(progress) == pytest.approx(expected, rel=rel, abs=1e-4)


@_wrapped("`lookahead`, around it")
@pytest.mark.parametrize("name", ["adapt_on_progress"])
def test_lookahead_hides_the_loss(name: str) -> None:
    """It passes no extra arguments on, and without the loss the scale only falls."""
    alone = getattr(sasa_optax, name)(0.0)
    inner = optax.chain(optax.sgd(0.1), alone)
    params = jnp.asarray(_START)
    params = optax.LookaheadParams.init_synced(params)
    optimizer = optax.lookahead(inner, sync_period=4, slow_step_size=1.0)
    optimizer = optax.with_extra_args_support(optimizer)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    scales = [1.0]
    for noise in jax.random.normal(jax.random.key(0), (128, 2)):
        grads = _grads(noise, params.fast)
        updates, state = update(grads, state, params, value=jnp.sum(params.fast**2))
        params = optax.apply_updates(params, updates)
        scales.append(float(optax.tree.get(state, "scale")))
    assert not bool(optax.tree.get(state, "sees_loss"))
    assert np.all(np.diff(scales) <= 0)
    assert scales[-1] < 1


# Faults.


def _assert_untouched(before: Any, after: Any, num_bad: int) -> None:
    chex.assert_tree_all_finite(without_momentum(after))
    get = optax.tree.get
    counted = int(get(after, "num_nonfinite")) - int(get(before, "num_nonfinite"))
    assert counted == num_bad
    for field in ("scale", "num_drops", "last_test", "learning_rate", "step_size"):
        chex.assert_trees_all_equal(get(after, field), get(before, field))
    window = get(before, "window")
    if window is not None:
        assert int(get(after, "window").total) == int(window.total)


for_all_controllers = pytest.mark.parametrize(
    "name", [x for x in ALL if x not in (*PLAIN, *SERVOS)]
)
for_all_servos = pytest.mark.parametrize("name", SERVOS)


@_faulty("NaN or Inf gradients, for one step or many: counted, no more")
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("num_bad", [1, 5])
@for_all_controllers
def test_gradients_that_are_not_finite(name: str, num_bad: int, bad: float) -> None:
    """The square of 1e30 overflows in single precision, though it is finite."""
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    params, before = _run(update, params, optimizer.init(params), _NOISE[:8])
    after = before
    for _ in range(num_bad):
        updates, after = update(jnp.full(2, bad), after, params)
        assert updates.shape == params.shape
    _assert_untouched(before, after, num_bad)


@_faulty("NaN or Inf parameters: counted, no more")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", [x for x in ALL if x not in (*PLAIN, *SERVOS, "slope")]
)
def test_parameters_that_are_not_finite(name: str, bad: float) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    params, before = _run(update, params, optimizer.init(params), _NOISE[:8])
    broken = params.at[0].set(bad)
    _, after = update(_grads(_NOISE[8], params), before, broken)
    _assert_untouched(before, after, 1)


@_faulty("gradients of zero are no evidence")
@for_all_controllers
def test_gradients_of_zero(name: str) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    state = optimizer.init(params)
    for _ in range(20):
        _, state = update(jnp.zeros(2), state, params)
    assert int(optax.tree.get(state, "num_drops")) == 0
    chex.assert_tree_all_finite(state)


@_faulty("gradients of zero are no evidence")
@for_all_servos
def test_updates_of_zero(name: str) -> None:
    """Of a run that never moved, or of one that has come to stand still."""
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    new = optimizer.init(params)
    old = _run(update, params, new, _NOISE)[1]
    for start in (new, old):
        state, params = start, optax.tree.get(start, "averaged")
        for _ in range(100):
            updates, state = update(jnp.zeros(2), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params, optax.tree.get(start, "averaged"))
        before, after = map(decided, (start, state))
        assert float(after["progress"]) <= float(before["progress"])
        assert float(after.get("scale", 0)) <= float(before.get("scale", 0))
        _assert_finite(state)


def _assert_finite(state: Any) -> None:
    """Except for the ceiling, which is infinite before the first cut."""
    if optax.tree.get(state, "ceiling") is not None:
        assert float(optax.tree.get(state, "ceiling")) > 0
        state = optax.tree.set(state, ceiling=jnp.zeros(()))
    chex.assert_tree_all_finite(state)


_BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])


@_faulty("NaN or Inf in gradients or parameters: progress and average as before")
@_BAD
@pytest.mark.parametrize("where", ["gradients", "parameters"])
@for_all_servos
def test_progress_of_what_is_not_finite(name: str, where: str, bad: float) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    params, before = _run(update, params, optimizer.init(params), _NOISE[:12])
    grads = _grads(_NOISE[12], params)
    if where == "gradients":
        grads = grads.at[0].set(bad)
    broken = params if where == "gradients" else params.at[0].set(bad)
    after = before
    loss = jnp.sum(params**2)
    for _ in range(3):
        updates, after = update(grads, after, broken, value=loss)
        assert updates.shape == params.shape
        _assert_finite(after)
        one, other = (optax.tree.get(state, "measured") for state in (before, after))
        one, other = (before[1], after[1]) if one is None else (one, other)
        np.testing.assert_array_equal(one.progress, other.progress)
        np.testing.assert_array_equal(one.walks, other.walks)
        if not np.isfinite(bad):
            averages = one.average.averaged, other.average.averaged
            np.testing.assert_array_equal(*(x[0] for x in averages))
            assert not np.array_equal(*(x[1] for x in averages))


@_faulty("NaN or Inf losses, for one step: back to the average; for many: one brake")
@_BAD
@pytest.mark.parametrize("num_bad", [1, 50])
@pytest.mark.parametrize("name", ["adapt_on_progress"])
def test_losses_that_are_not_finite(name: str, num_bad: int, bad: float) -> None:
    """The square of 1e30 overflows in single precision, though it is finite."""
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    params, before = _run(update, params, optimizer.init(params), _NOISE[:6])
    state, scale = before, float(optax.tree.get(before, "scale"))
    for _ in range(num_bad):
        average = sasa_optax.averaged_params(state)
        grads = jnp.full(2, np.nan)
        updates, state = update(grads, state, params, value=jnp.float32(bad))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, average, rtol=1e-6)
        _assert_finite(state)
    assert int(optax.tree.get(state, "num_nonfinite")) == num_bad
    assert int(optax.tree.get(state, "num_brakes")) == (num_bad > 1)
    cut = scale / 4 if num_bad > 1 else scale
    assert float(optax.tree.get(state, "scale")) == pytest.approx(cut, rel=0.1)
    params, state = _run(update, params, state, np.tile(_NOISE, (20, 1)))
    assert int(optax.tree.get(state, "num_brakes")) <= 1
    assert float(jnp.sum(params**2)) < float(jnp.sum(average**2))


@_faulty("`apply_if_finite` around what is before it: it trains on")
@pytest.mark.parametrize("name", ["adapt_on_progress"])
def test_it_trains_on_after_gradients_and_losses_that_are_nan(name: str) -> None:
    inner = optax.apply_if_finite(optax.adamw(1e-2), max_consecutive_errors=100)
    optimizer = optax.chain(inner, getattr(sasa_optax, name)())

    @jax.jit
    def step(params: Any, state: Any, noise: jax.Array, is_bad: jax.Array) -> Any:
        def loss(params: jax.Array) -> jax.Array:
            return jnp.sum((params - 3 + noise) ** 2) * jnp.where(is_bad, jnp.nan, 1)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(4)
    state = optimizer.init(params)
    noise = jax.random.normal(jax.random.key(0), (1000, 4))
    for k, row in enumerate(noise):
        is_bad = 150 <= k < 160
        average = sasa_optax.averaged_params(state)
        params, state = step(params, state, row, is_bad)
        assert np.all(np.isfinite(params))
        if is_bad:
            np.testing.assert_allclose(params, average, rtol=1e-6)
    assert np.max(np.abs(sasa_optax.averaged_params(state) - 3)) < 0.3
    assert int(optax.tree.get(state, "num_brakes")) == 1
    assert int(optax.tree.get(state, "num_nonfinite")) == 10
    assert int(optax.tree.get(state, "last_rise")) > 160
    _assert_finite(state)


@_faulty("a loss that never changes never raises the rate")
@pytest.mark.parametrize("name", ["adapt_on_progress"])
@pytest.mark.parametrize("loss", [0.0, -3.0, 1e-30, 7.123, 1e15])
def test_a_constant_loss(name: str, loss: float) -> None:
    optimizer = optax.chain(optax.sgd(0.1), getattr(sasa_optax, name)(0.0))

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        # A straight line, along which the rate would rise.
        grads = jnp.ones(2) + noise
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(loss))
        carry = optax.apply_updates(params, updates), state
        return carry, (state[1].scale, state[1].measured.progress)

    params = jnp.asarray(_START)
    noise = np.tile(_NOISE, (21, 1))[:500]
    (_, state), (scales, progress) = jax.lax.scan(
        step, (params, optimizer.init(params)), noise
    )
    assert progress[-1] > 10
    np.testing.assert_array_equal(scales, 1.0)
    assert int(optax.tree.get(state, "num_brakes")) == 0
    _assert_finite(state)


@_faulty("counters at the end of int32 stay there")
@for_all_servos
def test_counters_of_servos_at_their_end(name: str) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    end = jnp.int32(np.iinfo(np.int32).max)
    state = optax.tree.set(optimizer.init(params), num_averaged=end)
    if name == "adapt_on_progress":
        fields = ("num_losses", "num_missed", "num_nonfinite")
        state = optax.tree.set(state, **dict.fromkeys(fields, end))
        # Nothing is lost: a brake would count the losses anew.
        state = optax.tree.set(state, best=optax.tree.get(state, "fast"))
    for loss in (1.0, 1.0, np.nan):
        value = jnp.float32(loss)
        updates, state = update(jnp.ones(2), state, params, value=value)
        assert np.all(np.isfinite(updates))
        assert int(optax.tree.get(state, "num_averaged")) == int(end)
        assert int(optax.tree.get(state, "num_nonfinite", end)) == int(end)
        assert int(optax.tree.get(state, "num_losses", end)) == int(end)
        _assert_finite(state)


@_faulty("counters at the end of int32 stay there")
@for_all_controllers
def test_counters_at_their_end(name: str) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(_START)
    state = optimizer.init(params)
    end = jnp.int32(np.iinfo(np.int32).max)
    counters = ("step", "num_nonfinite", "total", "num_evaluations", "num_averaged")

    def is_counter(path: Any, _: Any) -> bool:
        return getattr(path[-1], "name", None) in counters

    at_end = jax.tree_util.tree_map_with_path(
        lambda path, x: end if is_counter(path, x) else x, state
    )
    after = at_end
    for grads in jnp.asarray(_NOISE[:6]):
        updates, after = update(grads, after, params)
        assert np.all(np.isfinite(updates))
    _, after = update(jnp.full(2, np.nan), after, params)
    leaves = jax.tree_util.tree_leaves_with_path(after)
    counts = [int(x) for path, x in leaves if is_counter(path, x)]
    # A drop may have emptied the window; none has passed the end and become negative.
    assert set(counts) <= {0, int(end)}
    assert int(optax.tree.get(after, "step")) == int(end)
    chex.assert_tree_all_finite(without_momentum(after))


@_faulty("momentum 0 forgets a gradient that is not finite")
@pytest.mark.parametrize("name", ["sasa", "sasa_plus", "qhm"])
def test_without_momentum_nothing_bad_is_remembered(name: str) -> None:
    optimizer = getattr(sasa_optax, name)(0.5, momentum=0.0)
    params = jnp.asarray(_START)
    state = optimizer.init(params)
    _, state = optimizer.update(jnp.full(2, np.nan), state, params)
    updates, _ = optimizer.update(jnp.ones(2), state, params)
    np.testing.assert_array_equal(updates, -0.5)
