"""One of two processes with four devices each, whose result `test_devices` compares.

Usage: python two_processes.py ADDRESS_OF_THE_COORDINATOR INDEX_OF_THIS_PROCESS
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def main(address: str, index: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=index)
    # This import makes arrays, and none may exist before the initialization.
    from test_devices import TWO_PROCESSES, decisions, numbers, run_fully_sharded

    mesh = Mesh(jax.devices(), ("fsdp",))
    assert mesh.size == 8
    assert len(jax.local_devices()) == 4
    replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    output = {}
    for name in TWO_PROCESSES:
        params, state = replicate(run_fully_sharded(name, mesh))
        arrays = numbers(params, state)
        lists = {key: np.asarray(x).tolist() for key, x in arrays.items()}
        output[name] = lists, decisions(state)
    print(json.dumps(output))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
