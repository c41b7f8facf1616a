"""One training step compared with open_clip's: same model, batch, precision and AdamW, on one device, in one run.

    python benchmarks/train_step.py --variants b32 --batch 32 --dtype float32 --huge-pages
    python benchmarks/train_step.py --variants b16,l14 --largest --compile --torch-python /path/to/python

Each side runs in a process of its own, and they take turns. The data are random and already on the device.
open_clip runs as in its trainer, with the numbers of our configuration; the two models must have the same number of
parameters. Memory is the peak of the device's allocator, on a CPU that of the process. MFU counts the model's own
matrix products and divides by the device's bf16 peak. Page faults are those of a step. See benchmarks/README.md.
"""

import contextlib
import functools
import gc
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import common

COLUMNS = {
    "model": "<6", "side": "<20", "pages": "<6", "batch": ">7,", "ms": ">10.1f", "fastest": ">10.1f",
    "images/s": ">9.1f", "TFLOP/s": ">8.3f", "MFU": ">6.1%", "GiB": ">7.2f", "faults": ">10,", "ours / it": ">9.2f",
}  # fmt: skip
WARM_UP = 2
TUNABLE = "glibc.malloc.hugetlb"
MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


class OutOfMemory(Exception):
    """A batch does not fit into the device's memory."""


class Ours:
    """The step that `clip_jax.train` runs."""

    def __init__(self, spec):
        import jax

        from clip_jax import config as config_lib
        from clip_jax import program
        from clip_jax.runtime import sharding

        self.jax = jax
        self.config = config_lib.load(spec["config"], spec["overrides"])
        self.device = jax.devices()[0]
        self.program, self.mesh = program, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [self.device])

    def prepare(self, batch_size):
        """Compiles for a batch size and makes state and batch; returns parameters, compile seconds and device."""
        import numpy as np

        from clip_jax.training.step import first_state, make_init

        jax, self.state = self.jax, None
        self.config.data.batch_size = batch_size
        program, *_ = self.program.shard(self.program.make_program(self.config), self.mesh)
        rng = np.random.default_rng(0)
        high = {
            name: 256 if x.dtype == np.uint8 else program.config.model.text.vocab_size
            for name, x in program.batch.items()
        }
        with self.out_of_memory(), jax.set_mesh(self.mesh):
            self.batch = {
                name: jax.device_put(rng.integers(0, high[name], x.shape, x.dtype), x.sharding)
                for name, x in program.batch.items()
            }
            init, _ = make_init(program.config, program.method, program.batch)
            shardings = jax.tree.map(lambda x: x.sharding, program.state)
            self.state = first_state(init, jax.random.key(0), shardings)
            start = time.perf_counter()
            self.step = self.program.compile_step(program)
        parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        return {
            "parameters": parameters,
            "compile_seconds": time.perf_counter() - start,
            "device": self.device.device_kind,
        }

    def run(self, steps):
        with self.out_of_memory():
            for _ in range(steps):
                self.state, metrics = self.step(self.state, self.batch)
            return float(metrics["loss"])

    def memory(self):
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    @contextlib.contextmanager
    def out_of_memory(self):
        try:
            yield
        except self.jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.state = None
            raise OutOfMemory from None


class OpenClip:
    """open_clip's training step: its model and loss, its trainer's parameter groups, autocast except in float32."""

    def __init__(self, spec):
        import open_clip
        import torch

        self.torch, self.spec = torch, spec
        self.clip = open_clip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = True  # like its trainer, and like XLA

    def prepare(self, batch_size):
        torch, spec = self.torch, self.spec
        self.model = self.optimizer = self.batch = None
        gc.collect()
        torch.cuda.empty_cache()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # a larger batch may not have fitted before
        torch.manual_seed(0)
        with self.out_of_memory():
            self.model = self.clip.CLIP(**spec["model"]).to(self.device).train()
            parameters = dict(self.model.named_parameters())
            plain = [p for name, p in parameters.items() if p.ndim < 2 or "ln" in name]
            rest = [p for name, p in parameters.items() if not (p.ndim < 2 or "ln" in name)]
            groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": spec["weight_decay"]}]
            self.optimizer = torch.optim.AdamW(
                groups, lr=spec["lr"], betas=spec["betas"], eps=spec["eps"], fused=spec["fused"] or None
            )
            self.forward = self.model
            if spec["compile"]:
                torch._dynamo.reset()  # otherwise a second batch size compiles for any size, which is slower
                self.forward = torch.compile(self.model)
            self.loss = self.clip.ClipLoss()
            size, text = spec["model"]["vision_cfg"]["image_size"], spec["model"]["text_cfg"]
            images = torch.randn(batch_size, 3, size, size, device=self.device)
            self.batch = (
                images,
                torch.randint(0, text["vocab_size"], (batch_size, text["context_length"]), device=self.device),
            )
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {"parameters": sum(p.numel() for p in parameters.values()), "device": device}

    def run(self, steps):
        torch = self.torch
        autocast = torch.autocast(
            self.device.type, getattr(torch, self.spec["dtype"]), enabled=self.spec["dtype"] != "float32"
        )
        with self.out_of_memory():
            for _ in range(steps):
                self.optimizer.zero_grad()
                with autocast:
                    loss = self.loss(*self.forward(*self.batch))
                loss.backward()
                self.optimizer.step()
                with torch.no_grad():
                    self.model.logit_scale.clamp_(0, 4.6052)
            return loss.item()

    def memory(self):
        return self.torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def out_of_memory(self):
        try:
            yield
        except self.torch.OutOfMemoryError:
            raise OutOfMemory from None


def work(spec):
    """Runs a side's process, which answers commands on its standard input, one JSON object a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with answers
    side = (Ours if spec["side"] == "clip_jax" else OpenClip)(spec)
    usage = functools.partial(resource.getrusage, resource.RUSAGE_SELF)
    for line in sys.stdin:
        name, argument = json.loads(line)
        try:
            if name == "prepare":
                answer = side.prepare(argument) | {"versions": common.versions()}
                side.run(WARM_UP)
                with contextlib.suppress(OSError):
                    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the compiler's
            elif name == "trace":
                with side.jax.profiler.trace(argument):
                    side.run(WARM_UP)
                answer = WARM_UP
            else:
                start, cpu_start = time.perf_counter(), time.process_time()
                faults = usage().ru_minflt
                loss = side.run(argument)
                seconds, cpu = (time.perf_counter() - start) / argument, (time.process_time() - cpu_start) / argument
                peak, faults = side.memory() or usage().ru_maxrss * 1024, (usage().ru_minflt - faults) // argument
                answer = {"seconds": seconds, "cpu_seconds": cpu, "loss": loss, "memory": peak, "page_faults": faults}
        except OutOfMemory:
            answer = None
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """The process of a side, controlled from the main process."""

    def __init__(self, spec, python):
        env = with_pages(os.environ, spec["pages"])
        if spec["largest"]:
            env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        else:
            env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other side shares the device
        command = [python, __file__, "--worker", json.dumps(spec)]
        self.name, self.turns = spec["side"], []
        self.pages = spec["pages"]
        self.about = None
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, name, argument):
        """Returns the answer to a command, or None when the batch does not fit."""
        self.process.stdin.write(json.dumps([name, argument]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the process of {self.name} ended; its message is above")
        return json.loads(line)

    def prepare(self, batch_size):
        self.about = self.ask("prepare", batch_size)
        return self.about is not None

    def measure(self, steps):
        self.turns.append(self.ask("run", steps))
        if self.turns[-1] is None:
            sys.exit(f"error: out of memory in {self.name} although the batch fitted before")

    def seconds(self):
        return [turn["seconds"] for turn in self.turns]

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # after torch.compile its pool of compilers may not end
            self.process.kill()
            self.process.wait()


def with_pages(env, pages):
    """Returns the variables of a process whose memory lies in pages of a kind: "small", "huge", or None as it is."""
    tunables = [x for x in env.get("GLIBC_TUNABLES", "").split(":") if x and not x.startswith(f"{TUNABLE}=")]
    tunables += [f"{TUNABLE}=1"] if pages == "huge" else []
    return dict(env) | ({"GLIBC_TUNABLES": ":".join(tunables)} if pages else {})


def open_clip_model(config):
    """Returns the arguments of `open_clip.CLIP` for a configuration, or None when open_clip has no such model."""
    from clip_jax import config as config_lib

    base, image = config_lib.base(), config.model.image
    text = config.model.text
    sizes = {"size", "patch", "width", "depth", "heads", "mlp_dim", "context", "vocab_size", "eot_id", "act"}
    differ = [
        d
        for d in config_lib.differences(base, config, ["model.image", "model.text"])
        if d[0].split(".")[-1] not in sizes
    ]
    if differ or config.method != "clip" or image.act != text.act or image.act not in ("gelu", "quick_gelu"):
        return None
    vision = dict(
        layers=image.depth,
        width=image.width,
        head_width=image.width // image.heads,
        mlp_ratio=image.mlp_dim / image.width,
    )
    tower = dict(layers=text.depth, width=text.width, heads=text.heads, mlp_ratio=text.mlp_dim / text.width)
    return dict(
        embed_dim=config.model.embed_dim, quick_gelu=image.act == "quick_gelu",
        vision_cfg=dict(vision, patch_size=image.patch, image_size=image.size),
        text_cfg=dict(tower, context_length=text.context, vocab_size=text.vocab_size),
    )  # fmt: skip


def sides_of(args, variant):
    """Returns `({name: (specification, interpreter)}, FLOPs per example)` of the sides of a variant."""
    from clip_jax import config as config_lib
    from clip_jax.program import make_program, model_flops

    path = f"{args.config}:{variant}" if variant else args.config
    optim = ["optim.name=adamw", "optim.lamb_adapt_all=false", "optim.lamb_max_norm=0"]
    optim += ["optim.lamb_bias_correction=true", "optim.lamb_fuse_qkv=false"]
    overrides = [f"model.dtype={args.dtype}", f"data.batch_size={args.batch}", *optim, *args.overrides]
    program = make_program(config_lib.load(path, overrides))
    config, optim = program.config, program.config.optim
    flops = model_flops(config) / config.data.batch_size
    sides = {
        "clip_jax": (dict(side="clip_jax", config=path, overrides=overrides, largest=args.largest), sys.executable)
    }
    model = open_clip_model(config)
    has_torch = (
        subprocess.run([args.torch_python, "-c", "import torch, open_clip"], capture_output=True).returncode == 0
    )
    if model and has_torch:
        spec = dict(
            model=model, dtype=config.model.dtype, lr=1e-5, betas=(optim.b1, optim.b2), eps=optim.eps, fused=args.fused
        )
        spec |= dict(weight_decay=optim.weight_decay, largest=args.largest)
        for compiled in (False, True)[: 1 + args.compile]:
            name = "open_clip, compiled" if compiled else "open_clip"
            sides[name] = (dict(spec, side=name, compile=compiled), args.torch_python)
    else:
        reason = f"{args.torch_python} cannot import it" if model else "it has no model of this configuration"
        print(f"no rows of open_clip: {reason}")
    kinds = ("small", "huge") if args.huge_pages else (None,)
    sides = {
        f"{name} {pages}" if pages else name: (dict(spec, pages=pages), python)
        for name, (spec, python) in sides.items()
        for pages in kinds
    }
    return sides, flops


def largest_batch(spec, python, batch):
    """Returns the largest batch that fits, to within an eighth: doubles or halves to bracket it, then bisects."""
    side, good = Side(spec, python), 0
    bad = None
    while bad is None or bad - good > max(1, good // 8):
        if side.prepare(batch):
            good = batch
            if side.about["device"] == "cpu":
                sys.exit("error: --largest needs a GPU or TPU")
        else:
            bad = batch
        if bad == 1:
            sys.exit(f"error: not even a batch of 1 fits ({side.name})")
        batch = 2 * good if bad is None else (good + bad) // 2
    side.close()
    return good


def measure(args, variant, report):
    """Measures the sides of a variant and adds their rows."""
    from clip_jax.runtime import hardware

    specs, flops = sides_of(args, variant)
    done = []
    # At the largest batch the device has no room for another process.
    for group in [[name] for name in specs] if args.largest else [list(specs)]:
        batch = largest_batch(*specs[group[0]], args.batch) if args.largest else args.batch
        sides = [Side(*specs[name]) for name in group]
        for side in sides:
            side.batch = batch
            if not side.prepare(batch):
                sys.exit(f"error: a batch of {batch} does not fit ({side.name})")
        for _ in range(args.repeats):
            for side in sides:
                side.measure(args.steps)
        for side in sides:
            side.close()
        done += sides
    if len({side.about["parameters"] for side in done}) > 1:
        sys.exit(
            "error: the models differ: "
            + ", ".join(f"{side.name} has {side.about['parameters']:,} parameters" for side in done)
        )
    rates = {(side.name, side.pages): side.batch / statistics.median(side.seconds()) for side in done}
    for side in done:
        its = rates[side.name, side.pages]
        chip, rate = hardware.chip_of(side.about["device"]), flops * its
        report.add(**{
            "model": variant, "side": side.name, "pages": side.pages, "batch": side.batch, "images/s": its,
            "faults": statistics.median_low(turn["page_faults"] for turn in side.turns),
            "GiB": side.turns[-1]["memory"] / 2**30, "ms": 1e3 * statistics.median(side.seconds()),
            "fastest": 1e3 * min(side.seconds()),
            "TFLOP/s": rate / 1e12, "MFU": chip and rate * chip.devices / chip.flops,
            "ours / it": rates["clip_jax", side.pages] / its, "flops_per_example": flops, "dtype": args.dtype,
            "turns": side.turns, **side.about,
        })  # fmt: skip


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    parser = common.make_parser(__doc__, "train_step")
    parser.add_argument("--config", default="configs/clip.py", help="a configuration (default: %(default)s)")
    parser.add_argument("--variants", default="b32,b16,l14", help="its variants (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=32, help="examples per step, with --largest the start of the search (default: 32)"
    )
    parser.add_argument("--largest", action="store_true", help="each side at the largest batch that fits on the GPU")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16"),
        help="dtype of matrix products (default: bfloat16)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side; the median counts (default: 5)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn; 10 or more on a GPU (default: 1)")
    parser.add_argument("--compile", action="store_true", help="add a row: open_clip under torch.compile")
    parser.add_argument(
        "--fused", action="store_true", help="PyTorch's fused AdamW, which open_clip's trainer does not use"
    )
    parser.add_argument(
        "--huge-pages", action="store_true", help=f"each side also with {TUNABLE}=1, as the launchers set it (Linux)"
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="the interpreter with open_clip (default: this one)"
    )
    args = common.parse(parser)
    if args.huge_pages and (not MODES.exists() or "[never]" in MODES.read_text()):
        parser.error(f"--huge-pages: this system has none ({MODES})")
    import jax

    # The workers have the device and its memory, and FLOPs are counted in plain attention, not in a fused kernel.
    jax.config.update("jax_platforms", "cpu")
    report = common.Report(COLUMNS)
    report.header()
    for variant in args.variants.split(","):
        measure(args, variant, report)
    report.write(args.json)


if __name__ == "__main__":
    main()
