"""The command `clip-jax`: runs the commands of this package, in any folder.

    clip-jax train --config=configs/clip.py:smoke --workdir=runs/smoke

`clip-jax NAME ARGUMENTS...` is `python -m MODULE ARGUMENTS...`; `python -m clip_jax` is `clip-jax`. Where the current
folder has no file `configs/clip.py`, the name stands for the configuration of the package.
"""

import importlib
import os
import sys

from clip_jax import config_files
from clip_jax.errors import unknown
from clip_jax.version import __version__

#: The commands by group: `{name: (module, what it does)}`. The name is the last part of the module's path.
COMMANDS = {
    "Train and evaluate": {
        "train": ("clip_jax.train", "trains a configuration, or resumes its run"),
        "evaluate": ("clip_jax.evaluate", "evaluates a checkpoint, and writes a report"),
        "study": ("clip_jax.study", "trains several configurations with several seeds, and writes a table"),
        "compare": ("clip_jax.compare", "compares runs"),
        "compile": ("clip_jax.compile", "tells whether a run fits on TPUs or GPUs, without them"),
        "search": ("clip_jax.search", "searches pictures with a checkpoint, by text or by picture"),
    },
    "Weights": {
        "load": ("clip_jax.interop.load", "imports third-party weights as a checkpoint"),
        "export": ("clip_jax.tools.export", "exports a checkpoint for open_clip or transformers"),
        "interpolate": ("clip_jax.tools.interpolate", "mixes the weights of two checkpoints"),
        "clip_benchmark": ("clip_jax.tools.clip_benchmark", "runs CLIP_benchmark on checkpoints"),
    },
    "Data": {
        "train_tokenizer": ("clip_jax.tools.train_tokenizer", "trains a tokenizer on the texts of a data set"),
        "manifest": ("clip_jax.tools.manifest", "lists the blocks of a data set, so that it opens at once"),
        "to_parquet": ("clip_jax.tools.to_parquet", "writes a data set as Parquet files"),
        "filter": ("clip_jax.tools.filter", "keeps pairs that pass ALIGN's rules"),
        "clip_score": ("clip_jax.tools.clip_score", "keeps the pairs that a model finds most similar"),
        "dedup": ("clip_jax.tools.dedup", "removes duplicates of pictures"),
        "balance": ("clip_jax.tools.balance", "balances captions over a list of entries"),
        "caption": ("clip_jax.tools.caption", "makes a caption for every picture"),
        "rewrite": ("clip_jax.tools.rewrite", "rewrites captions with a language model"),
        "regions": ("clip_jax.tools.regions", "computes features of regions of pictures"),
    },
    "Machines": {
        "hosts": ("clip_jax.runtime.hosts", "runs a command as several processes of this machine"),
        "launch": ("clip_jax.__main__", "starts training on a cluster: launch slurm, launch gke"),
    },
}
LAUNCHERS = ("gke", "slurm")  # those that need no checkout


def usage():
    """Returns the help text."""
    lines = ["usage: clip-jax COMMAND [ARGUMENT ...]", "", "clip-jax COMMAND --help explains a command."]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<16} {summary}" for name, (_, summary) in commands.items())]
    return "\n".join([*lines, "", f"version {__version__}"])


def launch(arguments):
    """Becomes the launcher that the first argument names, in the current folder; returns 2 where there is none."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("\n".join(f"clip-jax launch {name} --help" for name in LAUNCHERS))
    elif name not in LAUNCHERS:
        print(f"error: {unknown('clip-jax launch: no launcher', name, LAUNCHERS)}", file=sys.stderr)
        return 2
    else:
        place = config_files.folder("launch")
        os.environ |= {"CLIP_JAX_LAUNCH": place, "CLIP_JAX_PYTHON": sys.executable}
        os.execvp("bash", ["bash", os.path.join(place, f"{name}.sh"), *rest])
    return 0


def script():
    """Runs `clip-jax` and ends this process with its status."""
    from clip_jax.runtime import faults

    faults.script(main)


def main(argv=None):
    """Runs a command and returns its exit status; 2 for an unknown command. Imports nothing but that command."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    modules = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"clip-jax {__version__}")
    elif name == "launch":
        return launch(arguments)
    elif (key := name.replace("-", "_")) in modules:
        return importlib.import_module(modules[key]).main(arguments)
    else:
        print(f"error: {unknown('clip-jax has no command', name, modules)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    script()
