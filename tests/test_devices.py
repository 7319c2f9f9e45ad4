"""Each optimizer decides and moves the same on eight devices as on one.

Whatever the layout, and with no more communication than one sum of a few numbers.
"""

import functools
import importlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import ALL, DECISIONS, PLAIN, SERVOS, SMALL, squares

import sasa_optax

GROUP = "3. Devices"
NUM_DEVICES = 8
NUM_STEPS = 12
# From version 0.6 on, JAX tracks what varies inside `shard_map`.
_IS_RECENT = hasattr(jax, "shard_map")
_LIMIT = "JAX 0.5 does not track what varies in shard_map: docs/everywhere.md"
_not_on_jax_0_5 = pytest.mark.skipif(not _IS_RECENT, reason=_LIMIT)
_ROOT = pathlib.Path(__file__).parent.parent

for_all = pytest.mark.parametrize("name", ALL)
_environment = functools.partial(pytest.mark.environment, GROUP)

# The first axis of each is sharded.
_SHAPES = {"w": (16, 3), "v": (8, 2), "b": (8,)}
START = {key: np.ones(shape, np.float32) for key, shape in _SHAPES.items()}
_generator = np.random.default_rng(0)
# By step and by device. The batch has one example for each device.
NOISE = {
    key: _generator.normal(size=(NUM_STEPS, NUM_DEVICES, *shape)).astype(np.float32)
    for key, shape in _SHAPES.items()
}

# The optimizers that keep a window, and so run tests.
_TESTING = [
    name for name in ALL if "ssls" not in name and name not in (*PLAIN, *SERVOS)
]
# The same steps without our controller, for comparison.
_INNER: dict[str, optax.GradientTransformation] = {
    "sasa_plus": optax.sgd(0.1, momentum=0.9),
    "sasa": optax.sgd(0.1, momentum=0.9),
    "scale_by_sasa_plus": optax.sgd(1.0),
    "reduce_on_stationarity": optax.adam(1e-2),
    "adapt_on_progress": optax.sgd(0.1),
    "measure_progress": optax.sgd(0.1),
}


def make(name: str, **arguments: Any) -> Any:
    optimizer = ALL[name](**SMALL, **arguments)
    if name == "reduce_on_stationarity":
        return optax.chain(optax.adam(1e-2), optimizer)
    return optimizer


def _step(optimizer: Any, params: Any, state: Any, noise: Any, **extra: Any) -> Any:
    """A step on a quadratic, on which the dynamics become stationary."""
    grads = jax.tree.map(lambda e, x: e.mean(0) + 0.1 * x, noise, params)
    updates, state = optimizer.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def _run(
    step: Callable[..., Any],
    params: Any,
    state: Any,
    put: Callable[[Any], Any] = lambda noise: noise,
) -> tuple[Any, Any]:
    for i in range(NUM_STEPS):
        params, state = step(params, state, put({k: x[i] for k, x in NOISE.items()}))
    return params, state


def decisions(state: Any) -> dict[str, float]:
    """The decisions, equal except for rounding; empty for `qhm`, which makes none."""
    fields = [field for field in DECISIONS if field not in ("last_test", "progress")]
    found = {field: optax.tree.get(state, field) for field in fields}
    test = optax.tree.get(state, "last_test")
    if test is not None:
        found |= {"tested": test.at_step, "stationary": test.stationary}
    return {field: float(x) for field, x in found.items() if x is not None}


def numbers(params: Any, state: Any) -> dict[str, Any]:
    """The numbers that depend on the order of summation, on the host."""
    window = optax.tree.get(state, "window")
    samples = {} if window is None else {"samples": window.buffer}
    progress = optax.tree.get(state, "progress")
    measured = {} if progress is None else {"progress": progress}
    return jax.device_get(params | samples | measured)


@functools.cache
def _expected(name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The numbers and decisions of a run on one device."""
    optimizer = make(name)
    params = jax.tree.map(jnp.asarray, START)
    step = jax.jit(functools.partial(_step, optimizer))
    params, state = _run(step, params, optimizer.init(params))
    assert params["w"].devices() == {jax.devices()[0]}
    return numbers(params, state), decisions(state)


def _assert_as_expected(actual: tuple[Any, Any], name: str) -> None:
    _assert_equal((numbers(*actual), decisions(actual[1])), name)


def _assert_equal(actual: tuple[Any, Any], name: str) -> None:
    expected = _expected(name)
    # Samples are differences of larger numbers, hence the absolute tolerance.
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert actual[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("name", _TESTING)
def test_what_is_expected_comes_from_tests_that_ran(name: str) -> None:
    assert _expected(name)[1]["tested"] > 0


def test_what_is_expected_comes_from_rates_that_dropped() -> None:
    dropped = {name for name in _TESTING if _expected(name)[1]["num_drops"]}
    assert dropped >= {"sasa_plus", "scale_by_sasa_plus", "slope", "salsa"}


def test_what_is_expected_comes_from_rates_that_rose_and_were_cut() -> None:
    _, decided = _expected("adapt_on_progress")
    assert decided["num_overshoots"] == decided["num_brakes"] == 1
    assert decided["last_rise"] > decided["last_cut"] > 0


def _line() -> Mesh:
    return Mesh(jax.devices(), ("fsdp",))


# Data parallel.


@_environment("data parallel by `jit`")
@for_all
def test_data_parallel(name: str) -> None:
    mesh = Mesh(jax.devices(), ("data",))
    optimizer = make(name)
    params = jax.device_put(START, NamedSharding(mesh, P()))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    step = jax.jit(functools.partial(_step, optimizer))
    actual = _run(step, params, optimizer.init(params), put)
    assert len(actual[0]["w"].devices()) == NUM_DEVICES
    _assert_as_expected(actual, name)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@_environment("data parallel by `pmap`, with `pmean` of the gradients")
@for_all
def test_pmap(name: str) -> None:
    optimizer = make(name)

    def one_of_eight(params: Any, state: Any, noise: Any) -> Any:
        grads = jax.tree.map(lambda e, x: e + 0.1 * x, noise, params)
        grads = jax.lax.pmean(grads, "data")
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, START)
    replicas = jax.tree.map(
        lambda x: np.stack([x] * NUM_DEVICES), (params, optimizer.init(params))
    )
    actual = _run(jax.pmap(one_of_eight, axis_name="data"), *replicas)
    for leaf in jax.tree.leaves(actual):
        np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * NUM_DEVICES))
    _assert_as_expected(jax.tree.map(lambda x: x[0], actual), name)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize("by", ["pmap", "shard_map"])
@_environment(
    "data parallel by `pmap`, with `pmean` of the gradients", "adapt_on_progress"
)
def test_the_loss_is_averaged_over_the_examples(by: str) -> None:
    """Each device has the loss of its own examples, and must see the mean of all."""
    optimizer = make("adapt_on_progress")

    def loss(params: Any, noise: Any) -> jax.Array:
        return squares(jax.tree.map(lambda e, x: 0.1 * e + x, noise, params))

    def step(params: Any, state: Any, noise: Any, axis: str | None) -> Any:
        noise = jax.tree.map(lambda e: e.reshape(-1, *e.shape[-2:]), noise)
        value, grads = jax.value_and_grad(
            lambda params: jnp.mean(jax.vmap(loss, (None, 0))(params, noise))
        )(params)
        if axis is not None:
            value, grads = jax.lax.pmean((value, grads), axis)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.ones((16, 3)), "v": jnp.ones((8, 2))}
    state = optimizer.init(params)
    noise = {key: NOISE[key] for key in params}

    def run(step: Callable[..., Any], params: Any, state: Any) -> Any:
        for k in range(NUM_STEPS):
            row = {key: e[k] for key, e in noise.items()}
            params, state = step(params, state, row)
        return params, state

    expected = run(jax.jit(functools.partial(step, axis=None)), params, state)
    parallel = functools.partial(step, axis="data")
    if by == "pmap":
        replicas = jax.tree.map(lambda x: np.stack([x] * NUM_DEVICES), (params, state))
        actual = run(jax.pmap(parallel, axis_name="data"), *replicas)
        actual = jax.tree.map(lambda x: x[-1], actual)
    else:
        mesh = Mesh(jax.devices(), ("data",))
        specs = (P(), P(), P("data"))
        mapped = mapped_over(parallel, mesh, specs, (P(), P()), check=False)
        actual = run(jax.jit(mapped), params, state)
    losses = [optax.tree.get(state, "fast") for _, state in (actual, expected)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    chex.assert_trees_all_close(
        numbers(*actual), numbers(*expected), rtol=1e-5, atol=1e-5
    )
    decided = decisions(actual[1])
    assert decided == pytest.approx(decisions(expected[1]), rel=1e-6)
    assert decided["num_overshoots"] > 0


# Fully sharded.


def _state_like(optimizer: Any, state: Any, of_params: Any, of_others: Any) -> Any:
    """The state with these values in place of what is like the parameters, or not."""
    return optax.tree.map_params(
        optimizer,
        lambda _, of_param: of_param,
        state,
        of_params,
        transform_non_params=lambda _: of_others,
    )


def _fully_sharded(name: str, mesh: Mesh) -> tuple[Any, Any, Callable[[Any], Any]]:
    """The parameters, the state, and a function that shards the noise likewise."""
    params = jax.device_put(START, NamedSharding(mesh, P("fsdp")))
    of_noise = NamedSharding(mesh, P(None, "fsdp"))
    put = functools.partial(jax.device_put, device=of_noise)
    return params, make(name).init(params), put


def run_fully_sharded(name: str, mesh: Mesh) -> tuple[Any, Any]:
    params, state, put = _fully_sharded(name, mesh)
    return _run(jax.jit(functools.partial(_step, make(name))), params, state, put)


def _assert_laid_out(tree: Any, shardings: Any) -> None:
    for leaf, sharding in zip(*map(jax.tree.leaves, (tree, shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@_environment("fully sharded by `jit`: the layout is kept")
@for_all
def test_fully_sharded(name: str) -> None:
    mesh = _line()
    params, state = run_fully_sharded(name, mesh)
    _assert_as_expected((params, state), name)
    whole, parts = (NamedSharding(mesh, spec) for spec in (P(), P("fsdp")))
    of_params = dict.fromkeys(START, parts)
    of_state = _state_like(make(name), state, of_params, whole)
    _assert_laid_out((params, state), (of_params, of_state))


@_environment("fully sharded by `jit`: the layout is kept")
@for_all
def test_init_lays_the_state_out_like_the_parameters(name: str) -> None:
    parts = NamedSharding(_line(), P("fsdp"))
    optimizer = make(name)
    state = optimizer.init(jax.device_put(START, parts))
    of_params = dict.fromkeys(START, True)
    is_like = jax.tree.leaves(_state_like(optimizer, state, of_params, False))
    for leaf, like in zip(jax.tree.leaves(state), is_like, strict=True):
        assert (leaf.sharding == parts) == like


# By `shard_map`.

_SHARDED = {key: P("fsdp") for key in _SHAPES}
_PARTLY = _SHARDED | {"b": P()}


def mapped_over(step: Any, mesh: Mesh, specs: Any, out_specs: Any, check: bool) -> Any:
    arguments = {"mesh": mesh, "in_specs": specs, "out_specs": out_specs}
    if _IS_RECENT:
        return jax.shard_map(step, **arguments, check_vma=check)
    # JAX had it here before version 0.6.
    module = importlib.import_module("jax.experimental.shard_map")
    return module.shard_map(step, **arguments, check_rep=check)


def _make_parallel(
    name: str, loss: Callable[[Any], jax.Array], axis_name: Any = "fsdp"
) -> Any:
    """As `make`, for `shard_map`, where a loss needs a sum over the devices."""
    if name in PLAIN:
        return make(name)
    if name in SERVOS:
        optimizer = make(name, axis_name=axis_name)
        return _with_extra(optimizer, lambda _, params: {"value": loss(params)})
    small = {} if "ssls" in name else SMALL
    if name == "slope":
        optimizer = sasa_optax.slope(1.0, **SMALL, axis_name="fsdp")
        return _with_extra(optimizer, lambda grads, _: {"value": loss(grads)})
    if name in ("salsa", "ssls"):
        optimizer = getattr(sasa_optax, name)(1.0, **small, axis_name="fsdp")
        return _with_extra(optimizer, lambda *_: {"value_fn": loss})
    if name in ("scale_by_salsa", "scale_by_ssls"):
        optimizer = getattr(sasa_optax, name)(1.0, **small, axis_name="fsdp")
        return _with_extra(
            optimizer, lambda grads, _: {"value_fn": loss, "grad": grads}
        )
    return make(name, axis_name=axis_name)


def _with_extra(optimizer: Any, extra: Callable[[Any, Any], dict[str, Any]]) -> Any:
    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        return optimizer.update(updates, state, params, **extra(updates, params))

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _loss_over_devices(specs: dict[str, P]) -> Callable[[Any], jax.Array]:
    def part(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return jax.lax.psum(squares(x), axes) if axes else squares(x)

    def loss(tree: Any) -> jax.Array:
        return squares({}) + sum(part(x, tuple(specs[key])) for key, x in tree.items())

    return loss


def _sharded_step(
    optimizer: Any, mesh: Mesh, specs: dict[str, P], state: Any, check: bool
) -> Callable[..., Any]:
    own = (specs, _state_like(optimizer, state, specs, P()))
    of_noise = {key: P(None, *spec) for key, spec in specs.items()}
    step = functools.partial(_step, optimizer)
    return jax.jit(mapped_over(step, mesh, (*own, of_noise), own, check))


def _assert_sharded_by_hand(
    optimizer: Any, name: str, mesh: Mesh, specs: dict[str, P], check: bool
) -> None:
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    step = _sharded_step(optimizer, mesh, specs, state, check)
    actual = _run(step, params, state)
    for key, spec in specs.items():
        assert actual[0][key].sharding.spec == spec
    _assert_as_expected(actual, name)


@_environment("fully sharded by `shard_map` with `axis_name`, `check_vma=False`")
@for_all
def test_shard_map(name: str) -> None:
    optimizer = _make_parallel(name, _loss_over_devices(_SHARDED))
    _assert_sharded_by_hand(optimizer, name, _line(), _SHARDED, check=False)


@_not_on_jax_0_5
@_environment("partly sharded by `shard_map` with `axis_name`, the rest replicated")
@for_all
def test_shard_map_of_a_part(name: str) -> None:
    optimizer = _make_parallel(name, _loss_over_devices(_PARTLY))
    _assert_sharded_by_hand(optimizer, name, _line(), _PARTLY, check=True)


@_not_on_jax_0_5
@_environment("`shard_map` over two mesh axes, each array sharded over others")
@pytest.mark.parametrize("name", _INNER)
def test_shard_map_over_two_axes(name: str) -> None:
    axes = ("fsdp", "tensor")
    mesh = Mesh(np.reshape(jax.devices(), (4, 2)), axes)
    specs = {"w": P("fsdp"), "v": P(*axes), "b": P("tensor")}
    optimizer = _make_parallel(name, _loss_over_devices(specs), axes)
    _assert_sharded_by_hand(optimizer, name, mesh, specs, check=True)


@_not_on_jax_0_5
@pytest.mark.parametrize("name", ["sasa", "sasa_plus"])
def test_shard_map_without_axis_name_is_refused(name: str) -> None:
    """JAX refuses it because each device would decide by itself."""
    with pytest.raises(TypeError, match="cond branches must have equal"):
        _assert_sharded_by_hand(make(name), name, _line(), _SHARDED, check=True)


def test_quantiles_of_degrees_of_freedom_that_differ_between_devices() -> None:
    """JAX wants what a loop carries to differ between devices from its start."""
    dofs = jnp.arange(1.0, 1 + NUM_DEVICES)

    def of_one(dofs: jax.Array) -> jax.Array:
        return sasa_optax.student_t_quantile(0.9, dofs)

    mapped = mapped_over(of_one, _line(), P("fsdp"), P("fsdp"), check=True)
    np.testing.assert_allclose(mapped(dofs), of_one(dofs), rtol=1e-6)


# What is sent.


def _given_a_loss(optimizer: Any) -> Any:
    """The optimizer with a constant loss. To compute a loss would send something."""
    return _with_extra(
        optax.with_extra_args_support(optimizer), lambda *_: {"value": jnp.float32(1)}
    )


_COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def _sent(step: Any, *args: Any) -> list[str]:
    """The collectives of the compiled step. None of them may return an array."""
    text = step.lower(*args).compile().as_text()
    found = re.findall(rf"= (.*) ({_COLLECTIVES})(?:-start)?\(", text)
    for shapes, _ in found:
        sizes = [int(size or 1) for size in re.findall(r"f32\[(\d*)\]", shapes)]
        assert sum(sizes) <= 3 * len(_SHAPES), shapes
    return [kind for _, kind in found]


@_environment("fully sharded by `jit`: one small `all-reduce` a step, and no other")
@pytest.mark.parametrize("name", _INNER)
def test_what_is_sent_by_jit(name: str) -> None:
    mesh = _line()
    params, state, put = _fully_sharded(name, mesh)
    noise = put({key: x[0] for key, x in NOISE.items()})

    def sent(optimizer: Any, state: Any) -> list[str]:
        step = jax.jit(functools.partial(_step, _given_a_loss(optimizer)))
        return _sent(step, params, state, noise)

    inner = _INNER[name]
    assert sent(inner, inner.init(params)) == []
    kinds = sent(make(name), state)
    assert set(kinds) == {"all-reduce"}
    # With JAX 0.5, XLA does not merge them on CPUs: there is one for each number.
    assert len(kinds) == 1 or not _IS_RECENT


@_environment("by `shard_map`: one small `all-reduce` a step, and no other")
@pytest.mark.parametrize("name", _INNER)
def test_what_is_sent_by_shard_map(name: str) -> None:
    params = jax.tree.map(jnp.asarray, START)
    noise = {key: x[0] for key, x in NOISE.items()}

    def sent(optimizer: Any, specs: dict[str, P], check: bool) -> list[str]:
        state = optimizer.init(params)
        optimizer = _given_a_loss(optimizer)
        step = _sharded_step(optimizer, _line(), specs, state, check)
        return _sent(step, params, state, noise)

    optimizer = make(name, axis_name="fsdp")
    for specs, check in ((_SHARDED, False), (_PARTLY, True)):
        assert sent(_INNER[name], specs, check) == []
        assert sent(optimizer, specs, check) == ["all-reduce"]


# Sharding in types.


def _explicit_mesh() -> Mesh:
    explicit = jax.sharding.AxisType.Explicit
    return jax.make_mesh((NUM_DEVICES,), ("fsdp",), axis_types=(explicit,))


@_not_on_jax_0_5
@_environment("explicit mesh axes (sharding in types), under `lax.scan`")
@for_all
def test_explicit_mesh_axes(name: str) -> None:
    mesh = _explicit_mesh()
    optimizer = make(name)

    @jax.jit
    def scanned(params: Any, noise: Any) -> Any:
        start = (params, optimizer.init(params))

        def step(carry: Any, noise: Any) -> Any:
            params, state = carry
            return _step(optimizer, params, state, noise), None

        end, _ = jax.lax.scan(step, start, noise)
        for old, new in zip(*map(jax.tree.leaves, (start, end)), strict=True):
            assert jax.typeof(old).sharding.spec == jax.typeof(new).sharding.spec
        assert jax.typeof(end[0]["w"]).sharding.spec[0] == "fsdp"
        return end

    with jax.set_mesh(mesh):
        params = jax.device_put(START, NamedSharding(mesh, P("fsdp")))
        noise = jax.device_put(NOISE, NamedSharding(mesh, P(None, None, "fsdp")))
        end = scanned(params, noise)
    _assert_as_expected(end, name)


# Several processes.

TWO_PROCESSES = ("sasa_plus", "reduce_on_stationarity", "adapt_on_progress")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _outputs_of_two_processes() -> list[dict[str, Any]]:
    script = pathlib.Path(__file__).parent / "two_processes.py"
    address = f"127.0.0.1:{_free_port()}"
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": str(_ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    # The library of the collectives writes to the same stream, before this line.
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@_not_on_jax_0_5
@_environment("two processes by `jax.distributed`, fully sharded", *TWO_PROCESSES)
def test_two_processes() -> None:
    for output in _outputs_of_two_processes():
        assert output.keys() == set(TWO_PROCESSES)
        for name, (found, decided) in output.items():
            arrays = {key: np.asarray(x, np.float32) for key, x in found.items()}
            _assert_equal((arrays, decided), name)


# The page about all this.


@_not_on_jax_0_5
def test_the_code_in_the_documentation_runs() -> None:
    text = (_ROOT / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
