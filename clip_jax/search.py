"""Searches a folder or any data set with a checkpoint: by text, by image, by image plus or minus text.

    python -m clip_jax.search --checkpoint=runs/clip --images=/data/photos --text="a red apple" --text="a snowy dog"
    python -m clip_jax.search --checkpoint=runs/clip --images=/data/photos --image=query.jpg --minus="snow"
    python -m clip_jax.search --checkpoint=runs/clip --images=/data/photos --serve
    python -m clip_jax.search --checkpoint=runs/clip --images=emoji --image='#120' --find=texts --html=found.html

Every --text and every --image is a query. --plus and --minus change each query: it becomes the sum or difference of
unit vectors (Jia et al. 2021, figure 5). The candidates are the images of the data set or, with --find=texts, its
captions or the lines of --texts=FILE. The search is exact. The embeddings are kept next to the data and computed again
when the weights or the data have changed (docs/search.md).
"""

import contextlib
import dataclasses
import json
import pathlib
import re

import numpy as np

from clip_jax import search_page, search_server
from clip_jax.data import decode
from clip_jax.data.files import read_file
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import make_source
from clip_jax.errors import UserError
from clip_jax.evaluation.report.page import write_page
from clip_jax.runtime import command, storage
from clip_jax.search_index import Bank, check_folder, make_index, scores_of

#: The usual port of `--serve`.
PORT = 8017


@dataclasses.dataclass
class Query:
    """A query.

    Attributes:
      label: a line that describes it.
      image: its PIL image, or None.
      z: its embedding, float32 `[E]`, or `[n, E]` with one vector per token.
    """

    label: str
    image: object
    z: np.ndarray


def read_image(value, source, data=None):
    """Returns `(name, PIL image)` of a file, or for "#N" of record N of `source`.

    Args:
      value: the file or "#N".
      source: the data set.
      data: the content of the file, where it need not be read.

    Raises UserError when it cannot be read.
    """
    given = f"--image={value}" if data is None else value
    try:
        if data is not None:
            name = value
        elif match := re.fullmatch(r"#(\d+)", value):
            if int(match[1]) >= len(source):
                raise UserError(f"{given}: {source.name} has the records #0 to #{len(source) - 1}")
            record = source[int(match[1])]
            name, data = " ".join([value, *record["texts"][:1]]), record.get("image")
        else:
            name, data = value, read_file(value)
        return name, decode.flatten(decode.open_image(data))
    except BadRecord as bad:
        raise UserError(f"{given}: {bad.args[0]}") from None


def make_queries(model, texts=(), images=(), plus=(), minus=()):
    """Returns queries, each with all of `plus` added and all of `minus` subtracted.

    Args:
      model: a `clip_jax.inference.Model`.
      texts: strings, a query each. One string counts as a list of one, here and below.
      images: pairs `(name, PIL image)`, a query each.
      plus: strings to add.
      minus: strings to subtract.

    Raises UserError for `plus` or `minus` where the method has one vector per token.
    """
    from clip_jax.evaluation.embed import normalize

    texts, plus, minus = ([value] if isinstance(value, str) else value for value in (texts, plus, minus))
    z_texts = model.embed_text([*plus, *minus, *texts]) if (*plus, *minus, *texts) else ()
    if (plus or minus) and z_texts.ndim > 2:
        raise UserError(f"--plus and --minus add vectors, but method {model.config.method!r} has one for each token")
    z = iter(z_texts)
    change = sum([next(z) for _ in plus], 0.0) - sum([next(z) for _ in minus], 0.0)
    signs = "".join([f" + {text}" for text in plus] + [f" - {text}" for text in minus])
    queries = [Query(text, None, next(z) + change) for text in texts]
    if images:
        z_images = model.embed_image([image for _, image in images])
        queries += [Query(name, image, z_i + change) for (name, image), z_i in zip(images, z_images, strict=True)]
    for query in queries:
        query.label, query.z = query.label + signs, normalize(query.z)
    return queries


def lookup(source, texts, where):
    """Returns a hit: a dict with `text`, and for a data set also `record`, `path` and `image`.

    Args:
      source: the data set.
      texts: the lines of a file that was searched instead, or None.
      where: a row of `Index.where`.
    """
    if texts:
        return {"text": texts[where[0]]}
    number, text_number = map(int, where)
    try:
        record = source[number]
    except BadRecord:  # it was readable when the index was made
        return {"record": number, "text": "", "path": "", "image": None}
    text = record["texts"][text_number] if record["texts"] else ""
    return {"record": number, "text": text, "path": str(record.get("path", "")), "image": record.get("image")}


def table(query, hits):
    """Yields the lines of a query's results on the terminal."""
    yield ""
    yield query.label
    for rank, hit in enumerate(hits, 1):
        cells = [f"#{hit['record']}" if "record" in hit else "", " ".join(hit["text"].split()), hit.get("path", "")]
        yield f"{rank:>4}  {hit['score']:6.3f}  " + "  ".join(cell for cell in cells if cell)


def make_parser():
    """Returns the parser of the command line."""
    parser = command.make_parser("clip_jax.search", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a work folder, a checkpoint, or third-party weights (docs/checkpoints.md)")
    add("--which", default="latest", help="latest (default), best, or a step")
    add("--images", required=True, metavar="SOURCE", help="a folder of images or any data set (docs/data.md)")
    add("--split", default="train", help="of the data set (default: train)")
    add("--text", action="append", default=[], help="a query; may be repeated, like the next three")
    add("--image", action="append", default=[], metavar="FILE|#N", help="a query: a file, or record N of the data set")
    add("--plus", action="append", default=[], metavar="TEXT", help="added to every query")
    add("--minus", action="append", default=[], metavar="TEXT", help="subtracted from every query")
    add("--find", choices=("images", "texts"), default="images", help="what is searched (default: images)")
    add("--texts", metavar="FILE", help="with --find=texts: search its lines instead of the data set's captions")
    add("--k", type=int, default=10, help="results of each query (default: 10)")
    add("--index", metavar="FOLDER", help="keep the embeddings there; an index of other weights or data is an error")
    add("--html", metavar="FILE", help="write a page with large thumbnails")
    add("--serve", nargs="?", type=int, const=PORT, metavar="PORT", help=f"a search page in the browser (port {PORT})")
    add("--json", metavar="FILE", help="write the results as JSON")
    return parser


def read_lines(path):
    """Returns the non-empty lines of a text file; raises UserError when it cannot be read or has none."""
    try:
        lines = [line.strip() for line in pathlib.Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts={path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not any(lines):
        raise UserError(f"--texts={path}: the file has no text")
    return [line for line in lines if line]


def search(args, log=print):
    """Does the work of the command for its parsed arguments; returns `[(Query, hits)]`. Raises UserError."""
    if not args.text and not args.image and args.serve is None:
        raise UserError("no query: give --text or --image, or --serve for a page with a text field")
    if args.k < 1:
        raise UserError(f"--k={args.k}: must be at least 1")
    if args.index and storage.is_remote(args.index):
        raise UserError(f"--index={args.index}: must be a local folder, because it is read by parts")
    if args.index:
        check_folder(args.index)
    if args.texts and args.find != "texts":
        raise UserError("--texts needs --find=texts")
    source = make_source(args.images, args.split)
    images = [read_image(value, source) for value in args.image]
    texts = read_lines(args.texts) if args.texts else None

    from clip_jax.inference import load

    with contextlib.nullcontext() if args.serve is None else search_server.open_server(args.serve) as server:
        searcher = Searcher(load(args.checkpoint, args.which), source, args, texts, log)
        results = searcher.ask(args.text, images, args.plus, args.minus) if args.text or args.image else []
        title = f"{args.find.capitalize()} of {args.images.replace('{split}', args.split)}"
        if args.json:
            write_json(args.json, results)
        page = args.html and write_page(args.html, search_page.render(title, searcher.about, results))
        for query, hits in results:
            for line in table(query, hits):
                log(line)
        if page:
            log(f"\npage: {page}")
        if server:
            server.app = search_server.App(
                title,
                searcher.about,
                searcher.ask,
                lambda name, data: read_image(name, source, data),
                lambda number: source[number].get("image"),
            )
            log(f"search page: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
    return results


class Searcher:
    """Answers queries to a data set, or to the lines of a file.

    Args:
      model: a `clip_jax.inference.Model`.
      source: the opened data set.
      args: the parsed arguments of the command.
      texts: the lines of a file that is searched instead, or None.
      log: function of a line.

    Attributes:
      about: `[(name, text), ...]`, what is searched with what.
    """

    def __init__(self, model, source, args, texts, log):
        self.model, self.source = model, source
        self.texts, self.k = texts, args.k
        if texts:
            z, self.where = model.embed_text(texts), np.stack([np.arange(len(texts))] * 2, 1)
            searched, skipped = args.texts, {}
        else:
            index = make_index(model, source, args.find, args.images, args.split, args.index, log)
            z, self.where = index.z, index.where
            searched, skipped = args.images, index.skipped
            searched = searched.replace("{split}", args.split)
        self.bank = Bank(z, model.mesh)
        step = "" if model.step is None else f", step {model.step:,}"
        size = model.image_view.size
        self.about = [
            ("Searched", f"{len(z):,} {args.find} of {searched}"),
            ("Left out", f"{sum(skipped.values()):,} unusable records" if skipped else ""),
            ("Checkpoint", f"{args.checkpoint}{step}"),
            ("Model", f"{model.config.method}, {size} × {size} pixels, vectors of {z.shape[-1]:,} numbers"),
        ]

    def ask(self, texts, images, plus=(), minus=()):
        """Returns `[(Query, hits)]`; for the arguments see `make_queries`. Raises UserError as it does."""
        queries, found = make_queries(self.model, texts, images, plus, minus), []
        for of_texts in (True, False):  # in the order of make_queries
            if z_queries := [query.z for query in queries if (query.image is None) == of_texts]:
                scores = scores_of(self.model.method, of_texts)
                found += zip(*self.bank.search(np.stack(z_queries), self.k, scores), strict=True)
        results = []
        for query, (rows, values) in zip(queries, found, strict=True):
            scored = zip(rows, values, strict=True)
            hits = [lookup(self.source, self.texts, self.where[row]) | {"score": float(score)} for row, score in scored]
            results.append((query, hits))
        return results


def write_json(path, results):
    """Writes `[(Query, hits)]` as JSON, without images; raises UserError when it cannot be written."""
    found = [
        {"query": query.label, "found": [{k: v for k, v in hit.items() if k != "image"} for hit in hits]}
        for query, hits in results
    ]
    try:
        storage.write(path, json.dumps(found, indent=1))
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}") from None


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    args = make_parser().parse_args(argv)
    return command.run(lambda: search(args))


if __name__ == "__main__":
    command.script(main)
