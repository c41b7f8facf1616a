"""The cycles of a program's Pallas kernels by the TPU compiler's static estimate, each kernel compiled alone.

The compiler's estimate of a whole step leaves kernels out. It gives their cycles when it writes a static profile of its
own instructions, `--xla_jf_dump_static_llo_profile_to`. That flag is read when libtpu loads, and some programs make
the compiler abort with it, so the kernels are compiled in a process of their own.

The profile takes time that grows with the square of the work, and for some kernels that read from the HBM it is zero.
So a kernel is compiled for two rounds of its grid, on arrays that hold the blocks of these rounds and lie on the chip.
`clip_jax.hlo_cycles` compares the cycles with the time that the HBM needs for the whole arrays.
"""

import base64
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from clip_jax.hlo_cost import arrays
from clip_jax.hlo_cycles import KERNEL, kernels_of
from clip_jax.runtime import topology as topology_lib

_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
_DTYPES |= {f"{short}{bits}": f"{long}{bits}" for short, long in (("s", "int"), ("u", "uint")) for bits in (8, 16, 32)}
_FLAG = "--xla_jf_dump_static_llo_profile_to="
#: Seconds after which the process is ended. The kernel that it is at counts as one without an estimate.
_TIMEOUT = 1800


def kernel_cycles(text, topology, options):
    """Returns the cycles of a program's Pallas kernels, `{key of hlo_cycles.kernels_of: cycles of one run}`.

    A kernel for which the compiler gives none is missing.

    Args:
      text: the optimized HLO text of a program for a TPU.
      topology: the `clip_jax.runtime.topology.Topology` that it was compiled for.
      options: `{option: value}` of the compiler.
    """
    kernels, found = kernels_of(text), []
    requests = [_request(*kernel) for kernel in kernels.values()]
    while len(found) < len(requests):
        answers = _ask(dict(topology=topology.name, options=options, kernels=requests[len(found) :]))
        # The process prints a line after each kernel. The one after the last line ended it.
        found += (answers + [None])[: len(requests) - len(found)]
    return {key: cycles for key, cycles in zip(kernels, found, strict=True) if cycles}


def _request(i, operands):
    """What compiles a kernel again: its program, and the dtypes and shapes of its operands and results."""
    _, _, text = i.attributes.partition("backend_config=")
    written, _ = json.JSONDecoder().raw_decode(text)
    config = {key: written[key] for key in ("custom_call_config", "scoped_memory_configs") if key in written}
    shapes = [[(_DTYPES[a.dtype], a.dims) for shape in group for a in arrays(shape)] for group in (operands, [i.shape])]
    return dict(config=json.dumps(config), operands=shapes[0], results=shapes[1])


def _ask(request):
    """The cycles that a process of its own finds for the first kernels of a request, until one ends it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        try:
            output = subprocess.run(
                [sys.executable, "-m", "clip_jax.kernel_cycles", folder],
                input=json.dumps(request).encode(),
                env={**os.environ, "LIBTPU_INIT_ARGS": f"{flags} {_FLAG}{folder}".strip()},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT,
            ).stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
    return [json.loads(line) for line in output.splitlines()]


def _cut(config, rounds):
    """A kernel for fewer rounds of its grid: `(config, the rounds of the whole grid, blocks)`.

    Args:
      config: JSON whose `custom_call_config` holds the kernel as MLIR bytecode, base64.
      rounds: the rounds to keep, in the first direction that has several.

    The blocks are the shapes in which the kernel takes its operands and results, None for those that it takes whole.
    """
    from jaxlib.mlir import ir
    from jaxlib.mosaic.python import tpu

    config = json.loads(config)
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True  # the kernel is in a dialect for storage
        tpu.register_dialect(context)
        module = ir.Module.parse(base64.b64decode(config["custom_call_config"]["body"]))
        attributes = next(op for op in module.body.operations if "iteration_bounds" in op.attributes).attributes
        grid = list(ir.DenseI64ArrayAttr(attributes["iteration_bounds"]))
        first = next((i for i, n in enumerate(grid) if n > 1), None)
        attributes["iteration_bounds"] = ir.DenseI64ArrayAttr.get(
            [rounds if i == first else 1 for i in range(len(grid))]
        )
        windows = [ir.DictAttr(window) for window in ir.ArrayAttr(attributes["window_params"])]
        blocks = [list(ir.DenseI64ArrayAttr(w["window_bounds"])) if "window_bounds" in w else None for w in windows]
        blocks = [None] * ir.IntegerAttr(attributes["scalar_prefetch"]).value + blocks
        body = io.BytesIO()
        module.operation.write_bytecode(body)
    config["custom_call_config"]["body"] = base64.b64encode(body.getvalue()).decode()
    return json.dumps(config), math.prod(grid), blocks


def _main(folder):
    """Compiles the kernels of a request on stdin; prints the cycles of each as a line, null where there are none.

    A kernel that fails to compile ends the process.
    """
    import jax
    import jax.numpy as jnp

    request = json.load(sys.stdin)
    topology = topology_lib.parse_topology(request["topology"].partition("*")[0])
    placed = jax.sharding.SingleDeviceSharding(topology_lib.tpu_devices(topology)[0])

    def cycles_of_rounds(kernel, rounds):
        config, _, blocks = _cut(kernel["config"], rounds)
        arrays = [
            jax.ShapeDtypeStruct(dims if block is None else list(map(min, dims, (rounds * n for n in block))), dtype)
            for (dtype, dims), block in zip(kernel["operands"] + kernel["results"], blocks, strict=True)
        ]
        count = len(kernel["operands"])
        call = jax.ffi.ffi_call(KERNEL, arrays[count:], custom_call_api_version=1, legacy_backend_config=config)

        def run(value):  # the compiler keeps arrays on the chip that are made there
            return call(*(jnp.full(x.shape, value.astype(x.dtype)) for x in arrays[:count]))

        lowered = jax.jit(run).lower(jax.ShapeDtypeStruct((), "float32", sharding=placed))
        text = lowered.compile(compiler_options=request["options"]).as_text()
        name = re.search(rf'%([\w.\-]+) = [^\n]* custom_call_target="{KERNEL}"', text)[1]
        profile = (pathlib.Path(folder) / f"{name}_static_llo_profile.textproto").read_text()
        return int(re.search(r"estimated_cycles: (\d+)", profile)[1])

    for kernel in request["kernels"]:
        _, whole, _ = _cut(kernel["config"], 1)
        # What does not fit onto the chip in two rounds may fit in one.
        tries = (whole / rounds * cycles_of_rounds(kernel, rounds) for rounds in (min(2, whole), 1))
        print(json.dumps(next(filter(None, tries), None)), flush=True)


if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    _main(sys.argv[1])
