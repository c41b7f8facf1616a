"""Set-up of the tests: CPU with 8 simulated devices, a persistent compilation cache, golden fixtures."""

import gc
import os
import pathlib
import tempfile

import pytest

#: XLA flags of this process and of processes that tests start. Nearly all time goes into compiling small programs that
#: run for an instant. These flags more than halve it: both cores are busy anyhow, so code generation need not split.
COMPILE_FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in (*COMPILE_FAST.split(), "--xla_force_host_platform_device_count=8"):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
# The environment passes the cache on to processes that tests start, which compile the same small programs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"clip_jax_test_cache_{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

REPO = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(os.environ.get("CLIP_JAX_GOLDEN", REPO.parent / "shared" / "golden"))
FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def golden_files(pattern):
    """Returns the golden files or folders of a pattern, from CLIP_JAX_GOLDEN and the fixtures, as test parameters."""
    found = {
        path.name: path for folder in (FIXTURES, GOLDEN) if folder.is_dir() for path in sorted(folder.glob(pattern))
    }
    return [pytest.param(path, id=name) for name, path in found.items()] or [
        pytest.param(None, marks=pytest.mark.skip(f"no fixture {pattern}"))
    ]


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """Hides from the garbage collector what earlier files left: JAX programs, which it would walk again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def mesh8():
    """The current mesh, of 8 simulated devices: data=2, fsdp=2, tensor=2."""
    import jax

    from clip_jax.runtime import sharding

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        yield mesh
