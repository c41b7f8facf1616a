"""The head of the page: what was trained, on which data, how long, and what each row was evaluated on."""

from clip_jax.data.sources.splits import evaluation_split
from clip_jax.errors import UserError
from clip_jax.evaluation.prompts import load_templates
from clip_jax.evaluation.report.charts import read_metrics
from clip_jax.evaluation.report.page import escaped, facts, number, table
from clip_jax.runtime import goodput


def describe_task(task):
    """Returns what the page shows of a task that ran, `{"name", "data", "prompts", "task"}`, strings.

    Args:
      task: a `clip_jax.evaluation.tasks.Task`.
    """
    options, module = task.options, task.module
    read = module.sources(options) if hasattr(module, "sources") else ()
    data = " and ".join(filled(source, split or _usual_split(source)) for source, split in read)
    templates = load_templates(options["templates"]) if "templates" in options else ()
    prompts = templates[0] if templates else ""
    if len(templates) > 1:
        named = f"{options['templates']}: " if isinstance(options["templates"], str) else ""
        prompts = f"{named}{len(templates)} prompts, such as “{templates[0]}”"
    name = str(options.get("name", module.__name__.rpartition(".")[2]))
    return {"name": name, "data": data, "prompts": prompts, "task": task.text}


def filled(source, split):
    """Returns a source string for readers: `{split}` is filled in, else the split follows."""
    if "{split}" in source:
        return source.replace("{split}", split)
    return f"{source}, split {split}" if split else source


def head(result, config, metrics_jsonl, history=()):
    """Returns the head as HTML; empty where nothing is known.

    Args:
      result: the `EvalResult`; its `model` may have "step" and "parameters", its `evaluated` what `describe_task` says.
      config: nested configuration, or an empty dict.
      metrics_jsonl: the training run's metrics, or None.
      history: the changes of the run's configuration, as for `assembly.write_report`.
    """
    blocks = [facts(_facts(result.model, config, metrics_jsonl, history))]
    if result.evaluated:
        rows = [
            (escaped(ran["name"]), *(escaped(ran[key]) for key in ("data", "prompts")), _code(ran["task"]))
            for ran in result.evaluated
        ]
        blocks.append("<h3>What was evaluated</h3>" + table(["row", "data", "prompts", "task"], rows, "texts"))
    return "".join(blocks)


def _facts(model, config, metrics_jsonl, history):
    """Yields `(name, text or None)` of the run."""
    if "data" in config:
        data, size = config["data"], config["model"].get("image", {}).get("size")
        context = config["model"].get("text", {}).get("context")
        yield "Method", config["method"]
        share = data.get("holdout", 0.0)
        rest = f", without the {100 * share:g} % that are held out" if share else ""
        yield "Trained on", data["source"] and filled(data["source"], data["split"]) + rest
        step, steps = model.get("step"), config["train"]["steps"]
        batch = data["batch_size"]
        if step is not None:
            weights = ", moving average of the weights" if model.get("ema") else ""
            yield "Checkpoint", f"step {step:,} of {steps:,}{weights}"
            yield "Examples seen", f"{examples_read(history, step, batch):,} in batches of {batch:,}{_origin(history)}"
        else:
            yield "Training", f"{steps:,} steps of {batch:,} examples"
        yield "Pictures", size and f"{size} × {size} pixels"
        yield "Texts", context and f"up to {context} tokens"
    yield "Parameters", model.get("parameters") and number(model["parameters"])
    seconds = read_metrics(metrics_jsonl)[1] if metrics_jsonl is not None else {}
    spent = [seconds.get(f"seconds/{part}", [(0, None)])[-1][1] or 0.0 for part in goodput.PARTS]
    yield "Time of the run", goodput.duration(sum(spent)) if any(spent) else None


def examples_read(history, step, batch):
    """Returns the number of examples that a run itself has read until a step.

    Args:
      history: the changes of its configuration, as for `assembly.write_report`; its first line may have "forked_from".
      step: the step.
      batch: the batch size of its present configuration.
    """
    end, total = step, 0
    for row in reversed(history[1:]):  # backwards from the present size
        old, _ = row.get("changes", {}).get("data.batch_size", (batch, batch))
        if old != batch:
            total += batch * max(0, end - row["step"])
            end, batch = row["step"], old
    first = history[0]["step"] if _is_fork(history) else 0
    return total + batch * max(0, end - first)


def _origin(history):
    return f", after step {history[0]['step']:,} of {history[0]['forked_from']}" if _is_fork(history) else ""


def _is_fork(history):
    return bool(history) and "forked_from" in history[0]


def _usual_split(source):
    try:
        return evaluation_split(source)
    except UserError:
        return ""


def _code(text):
    return f"<code>{escaped(text)}</code>"
