"""What each method adds to a fully sharded step: bytes, collectives, and time.

    python -m benchmarks.performance.scale --publish     # the tables of docs/scale.md
    python -m benchmarks.performance.scale --all-reduce  # measures one on this machine
    python -m benchmarks.performance.scale --all-reduce --distributed  # in each process

The bytes of the state are those of the real states, and the bytes of a step and the
collectives those that XLA reports of a step compiled for eight CPU devices, with
parameters and gradients in bfloat16, and moments and averages in float32. Nothing that
large is allocated. The times follow from these by the formula of `seconds`, with the
hardware that the arguments describe.
"""

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import publishing
from benchmarks.performance.cases import BASELINES, PEERS, Case
from benchmarks.performance.optimizers import in_float32, tree_bytes, update_step
from benchmarks.publishing import DOCS, RESULTS, Row

NUM_DEVICES = 8
# Large enough that a window of samples is nothing beside them.
NUM_ARRAYS, SHAPE = 4, (2**14, 2**12)
NUM_PARAMS = NUM_ARRAYS * SHAPE[0] * SHAPE[1]
SETTINGS = [(10**9, 64), (10**9, 1024), (7 * 10**10, 64), (7 * 10**10, 1024)]
# mechanize refuses a state in float32 beside parameters in bfloat16.
METHODS = [
    Case("adamw", "adamw", BASELINES["adamw"]),
    *(case for case in PEERS if not case.name.startswith("mechanize")),
]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What the times depend on. The defaults are those of an NVIDIA H100 SXM.

    Attributes:
      bandwidth: bytes a second that a device reads and writes of its memory.
      latency: seconds of an all-reduce of a few numbers over all devices.
      flops: operations a second of a device in a forward and a backward pass.
      tokens: tokens of a device in a step.
    """

    bandwidth: float = 3.35e12
    latency: float = 50e-6
    flops: float = 0.4 * 989e12
    tokens: int = 8192


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the update of a method costs, whatever the size of the model.

    Attributes:
      state: bytes of the state for each parameter.
      accessed: bytes that the step reads and writes for each parameter.
      temporary: bytes of temporaries for each parameter.
      all_reduces: the number of all-reduces.
      sums: the numbers in them, for each array of parameters.
      others: other collectives, by kind.
    """

    state: float
    accessed: float
    temporary: float
    all_reduces: int
    sums: float
    others: list[str]

    def seconds(self, num_params: float, devices: int, hardware: Hardware) -> float:
        """The bytes over the bandwidth, and the latency of each all-reduce."""
        moved = self.accessed * num_params / devices
        return moved / hardware.bandwidth + self.all_reduces * hardware.latency


def model_seconds(num_params: float, hardware: Hardware) -> float:
    """The forward and the backward pass: six operations a parameter and token."""
    return 6 * num_params * hardware.tokens / hardware.flops


_COLLECTIVE = re.compile(
    r"= (.*) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, int]]:
    """The collectives of a compiled program: each kind, and how many numbers it has."""

    def size(shapes: str) -> int:
        found = re.findall(r"\w+\[([\d,]*)\]", shapes)
        return sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in found)

    return [(kind, size(shapes)) for shapes, kind in _COLLECTIVE.findall(program)]


def sharded(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays: those like a parameter are spread, the others are everywhere."""

    def laid_out(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P("fsdp") if x.shape == SHAPE else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(laid_out, tree)


def cost(case: Case) -> Cost:
    """What XLA says of a step that is fully sharded over eight devices."""
    mesh = Mesh(jax.devices("cpu")[:NUM_DEVICES], ("fsdp",))
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    params = {f"w{i}": leaf for i in range(NUM_ARRAYS)}
    state = jax.eval_shape(lambda params: case.make().init(in_float32(params)), params)
    carry, grads = sharded(((params, state), params), mesh)
    step = jax.jit(update_step(case), donate_argnums=0)
    compiled = step.lower(carry, grads).compile()
    analysis: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    found = collectives(compiled.as_text() or "")
    sums = [size for kind, size in found if kind == "all-reduce"]
    of_device = NUM_PARAMS / NUM_DEVICES
    return Cost(
        state=tree_bytes(state) / NUM_PARAMS,
        accessed=analysis["bytes accessed"] / of_device,
        temporary=memory.temp_size_in_bytes / of_device,
        all_reduces=len(sums),
        sums=sum(sums) / NUM_ARRAYS,
        others=sorted({kind for kind, _ in found} - {"all-reduce"}),
    )


def all_reduce_seconds(num_floats: int, repeats: int = 50, rounds: int = 10) -> float:
    """The time of an all-reduce of some floats over all devices, in a compiled loop.

    It is the least over the rounds, since whatever else runs makes it longer.
    """
    mesh = Mesh(jax.devices(), ("all",))
    rows = NamedSharding(mesh, P("all"))

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        def once(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            # Each row becomes the mean of all, which the next sum has to wait for.
            return jnp.broadcast_to(x.mean(axis=0), x.shape), None

        return jax.lax.scan(once, x, length=repeats)[0]

    x = jax.jit(lambda: jnp.ones((mesh.size, num_floats)), out_shardings=rows)()
    jax.block_until_ready(run(x))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        return (time.perf_counter() - start) / repeats

    return min(seconds() for _ in range(rounds))


# The tables.


def per_parameter(costs: dict[str, Cost]) -> str:
    heads = [
        "",
        "state, bytes",
        "a step, bytes",
        "temporaries, bytes",
        "all-reduces",
        "floats in them, for each array",
        "other collectives",
    ]
    lines = [
        [
            name,
            f"{cost.state:.0f}",
            f"{cost.accessed:.0f}",
            f"{cost.temporary:.0f}",
            cost.all_reduces,
            f"{cost.sums:.3g}",
            ", ".join(cost.others) or "none",
        ]
        for name, cost in costs.items()
    ]
    return publishing.markdown(heads, lines)


def _name(setting: tuple[int, int]) -> str:
    num_params, devices = setting
    return f"{num_params:.0e} on {devices}".replace("e+", "e")


def at_scale(costs: dict[str, Cost], hardware: Hardware) -> dict[str, str]:
    """The state of a device, the time of an update, and its share of a step."""
    heads = ["", *map(_name, SETTINGS)]

    def table(cell: Any, those: Iterable[str]) -> str:
        lines = [[name, *(cell(costs[name], *s) for s in SETTINGS)] for name in those]
        return publishing.markdown(heads, lines)

    def state(cost: Cost, num_params: int, devices: int) -> str:
        return f"{cost.state * num_params / devices / 1e9:.3g}"

    def milliseconds(cost: Cost, num_params: int, devices: int) -> str:
        return f"{1e3 * cost.seconds(num_params, devices, hardware):.3g}"

    def added(cost: Cost, num_params: int, devices: int) -> str:
        more, plain = (
            c.seconds(num_params, devices, hardware) for c in (cost, costs["adamw"])
        )
        whole = model_seconds(num_params, hardware) + plain
        return f"{100 * (more - plain) / whole:+.2f}"

    return {
        "memory": table(state, costs),
        "time": table(milliseconds, costs),
        "share": table(added, [name for name in costs if name != "adamw"]),
    }


def all_reduce_table(measured: list[Row]) -> str:
    lines = [[row["floats"], f"{1e6 * row['seconds']:.0f}"] for row in measured]
    return publishing.markdown(["floats", "µs"], lines, num_left=0)


def measure_all_reduce() -> list[Row]:
    sizes = (1, 2 * NUM_ARRAYS, 1024)
    return [{"floats": n, "seconds": all_reduce_seconds(n)} for n in sizes]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Hardware):
        parser.add_argument(f"--{field.name}", type=float, default=field.default)
    parser.add_argument("--all-reduce", action="store_true", help="measure that alone")
    parser.add_argument(
        "--distributed", action="store_true", help="after jax.distributed.initialize()"
    )
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.distributed:
        jax.distributed.initialize()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    measured = measure_all_reduce()
    print(f"{len(jax.devices())} devices\n\n{all_reduce_table(measured)}")
    if args.all_reduce:
        return
    names = [field.name for field in dataclasses.fields(Hardware)]
    hardware = Hardware(**{name: getattr(args, name) for name in names})
    costs = {case.name: cost(case) for case in METHODS}
    parts = {"per-parameter": per_parameter(costs), **at_scale(costs, hardware)}
    print(*parts.values(), sep="\n\n")
    if args.publish:
        made = publishing.provenance()
        rows = [{"case": name, **vars(each)} for name, each in costs.items()]
        rows = [row | {"made": made} for row in [*rows, *measured]]
        publishing.save(rows, RESULTS / "scale.json")
        command = "python -m benchmarks.performance.scale --publish"
        sentence = publishing.made_by(command, made)
        parts["all-reduce"] = f"{all_reduce_table(measured)}\n\n{sentence}"
        publishing.write(DOCS / "scale.md", parts)


if __name__ == "__main__":
    main()
