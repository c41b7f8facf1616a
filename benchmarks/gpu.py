"""All checks and measurements of one GPU in one run of at most nine minutes, without network.

    bash benchmarks/gpu.sh
    bash benchmarks/gpu.sh --parts=attention,b16
    bash benchmarks/gpu.sh --platform=cpu

Each part is a process of its own with a time limit. A part that fails prints one line, and the others run. The checks
run side by side where the machine has cores for it; what is timed runs alone. `--platform=cpu` runs the same parts in
tiny sizes on a CPU, which tests this script. The exit status is 1 when a part failed. See docs/gpu_checklist.md.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import common

COLUMNS = {"part": "<10", "case": "<40", "result": "<1"}
#: The checks come first; several run at once.
CHECKS = ("methods", "attention", "resume", "import")
#: `{part: seconds that are kept for it}`, of a run of `LIMIT` seconds in all. A part also has what others left.
TIMED = {"loss": 50, "b16": 85, "b16 torch": 95, "l14": 75, "b32": 90, "b32 torch": 95, "l14 torch": 120}
DEFAULT = (*CHECKS, "loss", "b16", "b16 torch", "l14")
LIMIT = 525
#: Seconds for all checks.
CHECKS_NEED = 200
CORES_PER_CHECK = 4

#: Batches for a GPU with the bytes `MEMORY`, the largest first; a smaller GPU starts at a smaller one. PyTorch does not
#: recompute the blocks of L/14, and gets smaller ones.
MEMORY = 141e9
BATCHES = {"b32": (3072, 2048, 1024, 512), "b16": (1024, 768, 512, 256), "l14": (2048, 1024, 512, 256)}
TORCH_BATCHES = {"b32": (2048, 1024, 512, 256), "b16": (768, 512, 256, 128), "l14": (384, 256, 128, 64)}
STEPS, TURNS = 3, 2
TINY = (
    "model.embed_dim=16 model.image.patch=8 model.image.size=16 model.image.width=32 model.image.heads=2 "
    "model.image.mlp_dim=64 model.image.depth=1 model.text.width=32 model.text.heads=2 model.text.mlp_dim=64 "
    "model.text.depth=1"
).split()
#: `(name, batch, tokens, heads, width of a head, causal)` of the towers.
ATTENTION = {
    "image B/32": (64, 50, 12, 64, False),
    "image B/16": (64, 197, 12, 64, False),
    "image L/14": (32, 257, 16, 64, False),
    "image H/14": (32, 257, 16, 80, False),
    "text": (64, 77, 8, 64, True),
}


class Failure(Exception):
    """A check found a wrong result."""


def need(condition, message):
    if not condition:
        raise Failure(message)


def check_methods(args):
    """Yields `(method, {...})`: `check_method` of every method, each in a process of its own."""
    files = sorted(path.stem for path in pathlib.Path(common.ROOT, "configs").glob("*.py"))
    wrong = []

    def run(name):
        rows = []
        options = argparse.Namespace(**vars(args) | {"method": name})
        problem = run_part("method", options, None, lambda *row: rows.append(row))
        if problem:
            print(problem[1], file=sys.stderr)  # for the log of the part
        return (name, {"error": problem[0]}) if problem else rows[0]

    with concurrent.futures.ThreadPoolExecutor(max(1, args.cores // 3)) as pool:
        for job in concurrent.futures.as_completed([pool.submit(run, name) for name in args.methods or files]):
            name, values = job.result()
            wrong += [name] if "error" in values else []
            yield name, values
    need(not wrong, f"these methods failed: {', '.join(wrong)}")


def check_method(args):
    """Yields one row: five steps of a method in bfloat16 on a random batch; its loss must stay finite."""
    import numpy as np
    from methods import Step, load

    config = load(args.method, 16).unlock()
    config.model.dtype = "bfloat16"
    config.update(dict(optim=dict(warmup_steps=0, schedule="constant", lr=1e-3)))
    start, losses = time.perf_counter(), []
    run = Step(config.lock())
    compiled = time.perf_counter() - start
    for _ in range(5):
        run.state, metrics = run.step(run.state, run.batch)
        losses.append(float(metrics["loss"]))
    bad = int(metrics["bad_steps"])
    need(not bad and np.isfinite(losses).all(), f"losses {losses}, {bad} bad steps")
    yield args.method, {"first loss": losses[0], "last loss": losses[-1], "bad steps": bad, "compile s": compiled}


def check_attention(args):
    """Yields `(tower, {...})`: cuDNN's attention in bfloat16 against float32's, with the plain one's error beside it.

    Errors are relative to the norm of the float32 result, of values and of the three gradients. cuDNN's must be at most
    twice as large as the plain one's. `unpadded` is cuDNN on an odd number of tokens, which `attend` pads.
    """
    import jax
    import jax.numpy as jnp

    from clip_jax.models.transformer import attend

    def values(q, k, v, weights, causal, attention):
        def loss(q, k, v):
            if attention == "unpadded":
                out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
            else:
                out = attend(q, k, v, causal=causal, attention=attention)
            return (out.astype(jnp.float32) * weights).sum(), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return [x.astype(jnp.float32) for x in (out, *gradients)]

    wrong = []
    for name, (batch, tokens, heads, width, causal) in ATTENTION.items():
        batch = batch if args.gpu else 2
        shape = (batch, tokens, heads, width)
        q, k, v, weights = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(values, static_argnums=(4, 5))(
                *(x.astype(jnp.float32) for x in (q, k, v)), weights, causal, "plain"
            )
        row, program = {}, {}
        for attention in ("auto", "plain", *(["unpadded"] if args.gpu and tokens % 2 else [])):
            fn = (
                jax.jit(functools.partial(values, causal=causal, attention=attention)).lower(q, k, v, weights).compile()
            )
            got, program[attention] = fn(q, k, v, weights), fn.as_text()
            errors = [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in zip(got, exact, strict=True)]
            seconds = timed(functools.partial(fn, q, k, v, weights))
            row |= {f"{attention} value": errors[0], f"{attention} gradient": max(errors[1:])}
            row |= {f"{attention} ms": 1e3 * seconds}
        row["cuDNN"] = "cudnn" in program["auto"].lower()
        for kind in ("value", "gradient"):
            if not row[f"auto {kind}"] <= 2 * row[f"plain {kind}"] + 1e-4 or row["cuDNN"] != args.gpu:
                wrong.append(name)
        yield name, row
    need(not wrong, f"without cuDNN or with too large an error: {', '.join(dict.fromkeys(wrong))}")


def timed(fn, repeats=5):
    """Returns the median seconds of a function on the device."""
    import jax

    jax.block_until_ready(fn())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def write_pictures(folder, classes=4, each=16):
    """Writes random PNG pictures of `classes` colours, a folder each, and pairs.tsv with their captions."""
    import numpy as np
    from PIL import Image

    rng, lines = np.random.default_rng(0), ["filepath\tcaption"]
    colors = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50)}
    for name, color in list(colors.items())[:classes]:
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(np.array(color) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            path = folder / "classes" / name / f"{number}.png"
            Image.fromarray(pixels).save(path)
            lines.append(f"{path}\ta {name} picture number {number}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")


def check_resume(args):
    """Yields one row: a training killed with SIGKILL and started again has every loss of an undisturbed one."""
    import faults

    steps, overrides = 60, ["model.dtype=bfloat16", "checkpoint.steps=10"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_pictures(folder)
        overrides += [f"data={folder}/pairs.tsv", f"compile.cache={folder}/cache", "data.workers=0"]
        start = functools.partial(faults.start, 1, steps=steps, more=overrides)
        begin = time.perf_counter()
        faults.finish(start(folder / "calm"), [(0,)])
        seconds = time.perf_counter() - begin
        (child,) = start(folder / "killed")
        saved = folder / "killed" / "checkpoints"
        while child.poll() is None and not any(saved.glob("[0-9]*/commit_success.txt")):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        (status,) = faults.finish([child], [(-signal.SIGKILL, 0)])
        reached = max(faults.losses(folder / "killed"), default=0)
        faults.finish(start(folder / "killed"), [(0,)])
        calm, found = faults.losses(folder / "calm"), faults.losses(folder / "killed")
        faults.check(calm, folder / "killed", steps)
    again = sum(map(len, found.values())) - steps
    row = {"killed after step": reached, "of": steps, "resumed from": reached - again, "last loss": calm[steps][0]}
    yield "kill -9", row | {"run s": seconds}
    need(status == -signal.SIGKILL and reached > again, "it was not killed behind a checkpoint and before its end")


def check_import(args):
    """Yields two rows: weights in open_clip's layout, loaded and compared with the CPU, and a zero-shot evaluation."""
    import jax
    import numpy as np
    from PIL import Image
    from safetensors.numpy import save_file

    import clip_jax
    from clip_jax import evaluate
    from clip_jax.interop import configs, load
    from clip_jax.interop.layouts import open_clip
    from clip_jax.runtime import sharding

    towers = dict(layers=12, width=768, patch_size=32, image_size=224), dict(layers=12, width=512, heads=8)
    if not args.gpu:
        towers = dict(layers=2, width=64, patch_size=8, image_size=32, head_width=32), dict(layers=2, width=32, heads=2)
    cfg = dict(embed_dim=512 if args.gpu else 32, vision_cfg=towers[0])
    cfg |= dict(text_cfg=dict(towers[1], context_length=77, vocab_size=49408))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_pictures(folder)
        ours = load.shapes(configs.open_clip.from_config(cfg, None, {}))
        shapes = {path: x.shape for path, x in ours.items()}
        arrays = {
            e.theirs: np.asarray(0.03 * rng.standard_normal(e.shape(shapes)), np.float32)
            for e in open_clip.entries(ours)
        }
        (folder / "weights").mkdir()
        save_file(arrays, folder / "weights" / "open_clip_model.safetensors")
        (folder / "weights" / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
        images = [Image.open(path) for path in sorted((folder / "classes").glob("*/1*.png"))]
        z = []
        for device in (jax.devices()[0], jax.devices("cpu")[0]):
            mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [device])
            with jax.default_matmul_precision("highest"):
                model = clip_jax.load(folder / "weights", mesh=mesh)
                z.append((model.embed_image(images), model.embed_text(["a red picture", "a dog"])))
        apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(*z, strict=True))
        yield "open_clip layout", {"tensors": len(arrays), "largest difference from the CPU": apart}
        need(apart < 2e-3, f"the embeddings of GPU and CPU differ by {apart:.2g}")
        start = time.perf_counter()
        task = f"zeroshot(source='{folder}/classes', templates=('a {{}} picture',), name='colors')"
        found = evaluate.run(clip_jax.load(folder / "weights"), task, log=lambda line: None).metrics
        yield "zero-shot, random weights", found | {"seconds": time.perf_counter() - start}
        need(all(np.isfinite(x) for x in found.values()), "a metric is not finite")


def measure_loss(args):
    """Yields the memory and the time of the losses over all pairs, from benchmarks/contrastive.py."""
    sizes = {"infonce": ("8192,32768", "8192"), "filip": ("512", "512")}
    for loss, (batches, timed_batches) in sizes.items():
        if not args.gpu:
            batches, timed_batches = "64,128", "64"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(pathlib.Path(__file__).parent / "contrastive.py"), f"--loss={loss}"]
            command += [f"--batches={batches}", f"--time={timed_batches}", "--repeats=3", f"--json={folder}/x.json"]
            done = subprocess.run(
                [*command, "--devices=1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            need(done.returncode == 0, f"{loss}: {first_line(done.stderr)}")
            for row in json.loads(pathlib.Path(folder, "x.json").read_text())["rows"]:
                yield f"{loss} {row.pop('batch'):,}", {name: x for name, x in row.items() if name != "loss"}


def measure_step(args, variant, torch=False):
    """Yields the time, the memory and the MFU of a step at the largest batch of the list that fits, and its kernels."""
    import jax
    import train_step

    from clip_jax.runtime import hardware

    jax.config.update("jax_platforms", "cpu")  # the side's process takes the device's memory
    overrides = ["model.dtype=bfloat16", *([] if args.gpu else TINY)]
    names = argparse.Namespace(
        config=f"{common.ROOT}/configs/clip.py", dtype="bfloat16", batch=8, overrides=overrides, largest=True,
        torch_python=args.torch_python if torch else "false", compile=True, fused=True, huge_pages=False,
    )  # fmt: skip
    specs, flops = train_step.sides_of(names, variant)
    wanted = "open_clip, compiled" if torch else "clip_jax"
    if wanted not in specs:
        yield wanted, {"skipped": f"{args.torch_python} has no open_clip"}
        return
    side = train_step.Side(*specs[wanted])
    batches = (TORCH_BATCHES if torch else BATCHES)[variant]
    fitting = [b for b in batches if b <= batches[0] * args.memory / MEMORY] or batches[-1:]
    start = time.perf_counter()
    batch = next((b for b in (fitting if args.gpu else [8]) if side.prepare(b)), None)
    ready = time.perf_counter() - start
    need(batch, f"{wanted}: not even a batch of {batches[-1]} fits")
    for _ in range(TURNS):
        side.measure(STEPS if args.gpu else 1)
    seconds, chip = min(side.seconds()), hardware.chip_of(side.about["device"])
    rate = flops * batch / seconds
    row = {"batch": batch, "ms": 1e3 * seconds, "images/s": batch / seconds, "TFLOP/s": rate / 1e12}
    row |= {"MFU": chip and rate / chip.flops, "GiB": side.turns[-1]["memory"] / 2**30}
    yield wanted, row | {"compile s": side.about.get("compile_seconds"), "s to the first step": ready}
    if not torch:
        with tempfile.TemporaryDirectory() as folder:
            folder = args.traces and os.path.join(args.traces, variant) or folder
            steps = side.ask("trace", folder)
            total, kernels = top_kernels(folder)
        need(kernels, "the trace has no kernel")
        yield "kernels, in all", {"ms a step": total / steps, "busy": total / steps / (1e3 * seconds)}
        for name, ms, count in kernels:
            yield name[:40], {"share": ms / total, "ms a step": ms / steps, "runs a step": count / steps}
    side.close()


def top_kernels(folder, count=8):
    """Returns `(ms of all kernels, [(name, ms, runs)])` of a trace. Numbers are cut off the names."""
    import collections

    from jax.profiler import ProfileData

    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = list(ProfileData.from_file(str(path)).planes)
    on_device = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    streams = [line for line in on_device if line.name.startswith("Stream")]
    lines = streams or [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
    ms, runs = collections.Counter(), collections.Counter()
    for line in lines:
        for event in line.events:
            # On a CPU a thread's line also has the runtime's own functions; instructions name their program.
            if streams or "hlo_op" in dict(event.stats):
                name = re.sub(r"[._]\d+|(?<=[a-z_])\d+$", "", event.name)
                ms[name] += event.duration_ns / 1e6
                runs[name] += 1
    return sum(ms.values()), [(name, value, runs[name]) for name, value in ms.most_common(count)]


PARTS = {
    "methods": check_methods, "method": check_method, "attention": check_attention, "resume": check_resume,
    "import": check_import, "loss": measure_loss,
    **{name: functools.partial(measure_step, variant=name) for name in BATCHES},
    **{f"{name} torch": functools.partial(measure_step, variant=name, torch=True) for name in BATCHES},
}  # fmt: skip


def first_line(error):
    """Returns the line of an exception, or of a process's output, that says what is wrong."""
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith((" ", "\t", "*", "-"))]
    lines = [line for line in lines if not line.endswith("its message is above")] or lines
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Failure|Interrupt)\b|error: ", line)]
    return (named or lines or ["it ended without a message"])[-1][:200]


def work(name, args):
    """Runs a part in this process; prints a JSON list `[case, values]` a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with answers
    try:
        for case, values in PARTS[name](args):
            print(json.dumps([case, values]), file=answers, flush=True)
    except Exception as error:  # the line above it is what the table shows
        import traceback

        traceback.print_exc()
        print(json.dumps([None, first_line(error)]), file=answers, flush=True)


def run_part(name, args, seconds, add):
    """Runs a part in a process of its own, and `add(case, values)` for each row.

    Returns None, or what is wrong in a line, and the end of the process's own messages.
    """
    options = dict(vars(args), json=None)
    env = dict(os.environ, JAX_PLATFORMS="cuda,cpu" if args.gpu else "cpu")
    if name not in TIMED:
        env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several share the device
    if name == "resume":  # equal losses need programs that always add in the same order
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    command, problem = [sys.executable, __file__, "--worker", json.dumps([name, options])], []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, start_new_session=True
        )

        def read():
            for line in process.stdout:
                case, values = json.loads(line)
                if case is None:
                    problem.append(values)
                else:
                    add(case, values)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            problem.append(f"not done within {seconds:.0f} s")
        # Whatever the part started ends with it.
        for child in [process.pid, *children(process.pid)]:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        reader.join()
        errors.seek(0)
        text = errors.read()
    if process.returncode and not problem:
        died = process.returncode < 0
        problem.append(f"it ended with {signal.Signals(-process.returncode).name}" if died else first_line(text))
    return (problem[0], text[-4000:]) if problem else None


def children(pid):
    """Returns the processes, in sessions of their own, that a process has started (Linux)."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread or a child that has ended meanwhile
            for child in map(int, path.read_text().split()):
                with contextlib.suppress(OSError):
                    found += [child] if os.getpgid(child) == child else []
    return found


def find_gpu():
    """Returns `(name, bytes of memory)` of the first GPU by nvidia-smi, or None."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout.strip() else None
    return fields and (fields[0], int(fields[1]) * 2**20)


def text_of(values):
    """Returns the values of a row as a line."""

    def show(name, x):
        if isinstance(x, float):
            return f"{x:.1%}" if name in ("MFU", "share", "busy") else f"{x:.4g}"
        return "-" if x is None else f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)

    return ", ".join(f"{name} {show(name, x)}" for name, x in values.items())


class Run:
    """The parts of one run, their rows and their deadline."""

    def __init__(self, args, names):
        self.args, self.deadline = args, time.monotonic() + args.limit
        wanted = sum(TIMED.get(name, 0) for name in names) + (CHECKS_NEED if {*names} & {*CHECKS} else 0)
        self.share = min(1, args.limit / max(wanted, 1))  # of the seconds in `TIMED`
        self.report = common.Report(COLUMNS, device=args.device, platform=args.platform)
        self.lock, self.failed = threading.Lock(), []

    def add(self, part, case, values, **more):
        with self.lock:
            self.report.add(part=part, case=case, result=text_of(values), values=values, **more)

    def part(self, name, later):
        """Runs a part, and leaves time for the timed parts `later`."""
        start = time.monotonic()
        seconds = self.deadline - start - self.share * sum(TIMED[other] for other in later)
        problem = None
        if seconds > 5:
            problem = run_part(name, self.args, seconds, functools.partial(self.add, name))
        else:
            problem = ("no time was left", "")
        took = {"seconds": time.monotonic() - start}
        if problem:
            self.failed.append(name)
            self.add(name, "FAILED", {"": problem[0]} | took, log=problem[1])
        else:
            self.add(name, "done", took)


def main(argv=None):
    """Runs the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        name, options = json.loads(argv[1])
        return work(name, argparse.Namespace(**options))
    parser = common.make_parser(__doc__, "gpu")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: tiny sizes (default: gpu)")
    parser.add_argument(
        "--parts", default=",".join(DEFAULT), help="default: %(default)s; also b32, b32 torch, l14 torch"
    )
    parser.add_argument("--methods", default="", help="files of configs/ for the part methods (default: all)")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="seconds for all parts; where they are too few, each part has less (default: %(default)s)",
    )
    parser.add_argument("--traces", help="a new folder that keeps the traces of the steps, for XProf")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with open_clip (default: this one)")
    args = parser.parse_args(argv)
    names = [name for name in args.parts.split(",") if name]
    if unknown := [name for name in names if name not in (*CHECKS, *TIMED)]:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join((*CHECKS, *TIMED))}")
    if args.traces and os.path.exists(args.traces):
        parser.error(f"--traces={args.traces}: exists already")
    args.methods = [name for name in args.methods.split(",") if name]
    args.gpu, found = args.platform == "gpu", find_gpu()
    if args.gpu and not found:
        parser.error("nvidia-smi finds no GPU; --platform=cpu tests the script without one")
    args.device, args.memory = found if args.gpu else ("cpu", 0)
    args.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    run = Run(args, names)
    run.report.header()
    measured = [name for name in names if name in TIMED]
    with concurrent.futures.ThreadPoolExecutor(max(1, args.cores // CORES_PER_CHECK)) as pool:
        list(pool.map(lambda name: run.part(name, measured), [name for name in names if name in CHECKS]))
    for i, name in enumerate(measured):
        run.part(name, measured[i + 1 :])
    run.report.write(args.json)
    print(f"{len(names) - len(run.failed)} of {len(names)} parts done; failed: {', '.join(run.failed) or 'none'}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
