"""The cycles of a program's Pallas kernels by the TPU compiler's static estimate, each kernel compiled alone.

The compiler's estimate of a whole step leaves kernels out. It gives their cycles when it writes a static profile of its
own instructions, `--xla_jf_dump_static_llo_profile_to`. That flag is read when libtpu loads, and some programs make
the compiler abort with it, so the kernels are compiled in a process of their own.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from clip_jax.hlo_cost import arrays
from clip_jax.hlo_cycles import kernels_of
from clip_jax.runtime import topology as topology_lib

_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
_DTYPES |= {f"{short}{bits}": f"{long}{bits}" for short, long in (("s", "int"), ("u", "uint")) for bits in (8, 16, 32)}
_FLAG = "--xla_jf_dump_static_llo_profile_to="


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
        answer = subprocess.run(
            [sys.executable, "-m", "clip_jax.kernel_cycles", folder],
            input=json.dumps(request),
            env={**os.environ, "LIBTPU_INIT_ARGS": f"{flags} {_FLAG}{folder}".strip()},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    return [json.loads(line) for line in answer.stdout.splitlines()]


def _main(folder):
    """Compiles the kernels of a request on stdin; prints the cycles of each, or null, as a line."""
    import jax

    request = json.load(sys.stdin)
    topology = topology_lib.parse_topology(request["topology"].partition("*")[0])
    placed = jax.sharding.SingleDeviceSharding(topology_lib.tpu_devices(topology)[0])
    for kernel in request["kernels"]:
        operands = [jax.ShapeDtypeStruct(dims, dtype, sharding=placed) for dtype, dims in kernel["operands"]]
        results = [jax.ShapeDtypeStruct(dims, dtype) for dtype, dims in kernel["results"]]
        call = jax.ffi.ffi_call(
            "tpu_custom_call", results, custom_call_api_version=1, legacy_backend_config=kernel["config"]
        )
        try:
            compiled = jax.jit(call).lower(*operands).compile(compiler_options=request["options"])
        except jax.errors.JaxRuntimeError:
            print("null", flush=True)
            continue
        name = re.search(r"%([\w.\-]+) = [^\n]* custom-call\(", compiled.as_text())[1]
        profile = pathlib.Path(folder) / f"{name}_static_llo_profile.textproto"
        cycles = re.search(r"estimated_cycles: (\d+)", profile.read_text() if profile.exists() else "")
        print(cycles[1] if cycles else "null", flush=True)


if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    _main(sys.argv[1])
