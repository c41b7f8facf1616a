"""Set-up of the tests: CPU with 8 simulated devices, a persistent compilation cache, golden fixtures."""

import gc
import os
import pathlib
import signal
import tempfile

import pytest

#: XLA flags of this process and of processes that tests start. Nearly all time goes into compiling small programs that
#: run for an instant. These flags more than halve it. Both cores are busy anyhow, so code generation need not split.
#: The last flag leaves out XLA's check of the program after each pass. To debug a crash of XLA, run a test without it.
COMPILE_FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_disable_hlo_passes=hlo-verifier"
)

gc.set_threshold(20_000)  # the objects of a trace live long: looking through them often finds nothing
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; programs of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
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

#: The files that take longest. They start first, so that no process ends long after the others.
LONGEST = """
    clippo oner faults models pyramidclip alip compile export raclip step otter train declip storage gradients
    adding_a_method filip transformer align_config contrastive documents hosts init_from scale launchers zerovl laclip
    frozen caption interop recipe_towers efficientnet align unicl finetuning resnet lit_flip options small inference
""".split()
#: What `--fast` runs, for the loop of a developer: whole files, and single tests as `file::test`.
FAST = """
    architecture docs config recipes formats columns values sources manifest webdataset tar_blocks tfrecord mds parquet
    tokenizers augment text_augment decode ids uids splits filter report summary tools zeroshot retrieval knn
    step::test_the_state_is_donated step::test_the_moving_average_follows_the_weights
    contrastive::test_equal_embeddings_give_ln_b contrastive::test_accuracy_counts_both_directions
""".split()


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="run only the quick tests that conftest.py lists in FAST")


def pytest_ignore_collect(collection_path, config):
    """Leaves files without a quick test unread under `--fast`."""
    if config.getoption("--fast") and collection_path.suffix == ".py":
        return collection_path.stem.removeprefix("test_") not in {name.split("::")[0] for name in FAST} or None


def pytest_collection_modifyitems(config, items):
    """Leaves the single tests of FAST under `--fast`; sorts the files by their time."""

    def is_fast(item):
        name = item.path.stem.removeprefix("test_")
        return name in FAST or f"{name}::{item.name.split('[')[0]}" in FAST

    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if not is_fast(item)])
        items[:] = filter(is_fast, items)
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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
