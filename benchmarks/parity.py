"""Our models in open_clip and transformers: exported random weights of the published sizes give equal embeddings.

    python benchmarks/parity.py --sizes ViT-B/32,RN50,SigLIP-B/16-224 --torch-python /path/to/python

For each size and target, `clip_jax.interop.export` writes a folder. Another interpreter (`--torch-python`) loads it
with the library's own functions: weights, preprocessing and tokenizer. Both sides embed the same images and texts
in float32 on the CPU. `image` and `text` are the largest differences between entries of the unit vectors. `apart`
is the smallest difference between two inputs (the largest over their entries); a small value would make the
comparison meaningless. `same ids` says whether the tokenizers agree up to the end of text. The exit status is 1
when a difference exceeds --tolerance.

Every parameter is random, biases, gains and running statistics included. SigLIP has our shipped tokenizer with 4,096
pieces instead of 32,000, and for open_clip the activation `gelu`, which timm's B/16 has there (docs/checkpoints.md).
ALIGN-B0 to ALIGN-B7 are an EfficientNet with a BERT of 4 layers and a vocabulary of letters, for transformers alone.

    python benchmarks/parity.py --towers all --torch-python /path/to/python

compares single towers the other way round (`benchmarks/parity_towers.py`): the library makes one with random weights
and stores it, and we load it.
"""

import math
import os
import pathlib
import shutil
import string
import subprocess
import sys
import tempfile
import time

import common
import parity_towers

COLUMNS = {"model": "<30", "target": "<21", "parameters": ">13,", "image": ">9.1e", "text": ">9.1e", "apart": ">8.1e"}
COLUMNS |= {"same ids": ">9", "seconds": ">8.1f"}
SIZES = "ViT-B/32,ViT-B/16,ViT-L/14,RN50,RN101,RN50x4,SigLIP-B/16-224,ALIGN-B0"
TEXTS = ["a photo of a cat", "Hello, World!", "zwölf  Boxkämpfer & a <dog>", "an astronaut riding a horse " * 30]
IMAGES = 4


def use_align(config, name, folder):
    """Sets the configuration to an ALIGN with the EfficientNet `name`; `folder` gets its vocabulary."""
    from clip_jax.models.efficientnet import scaled
    from clip_jax.models.towers import EFFICIENTNETS, IMAGE_TOWERS, TEXT_TOWERS, all_fields

    image = dict(zip(("width_coefficient", "depth_coefficient"), EFFICIENTNETS[name], strict=True))
    image |= dict(kind="efficientnet", size=224, padding="even", first_residual=False, proj=False)
    text = dict(kind="bert", context=64, pad_id=0, width=256, depth=4, heads=4, mlp_dim=1024, vocab_size=0, eot_id=-1)
    config.model.image, config.model.text = all_fields(IMAGE_TOWERS, image), all_fields(TEXT_TOWERS, text)
    config.model.embed_dim = scaled(320, image["width_coefficient"])
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + letters + [f"##{x}" for x in letters]
    pathlib.Path(folder, "vocab.txt").write_text("\n".join(pieces))
    config.method, config.tokenizer = "align", f"wordpiece:{folder}/vocab.txt"
    config.model.image_mean = config.model.image_std = (0.5, 0.5, 0.5)


def make_model(size, target, folder):
    """Returns our model of a published size with random weights; `folder` gets the files that it needs."""
    import jax
    import numpy as np

    from clip_jax import config as config_lib
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.inference import Model
    from clip_jax.methods.interface import make_method
    from clip_jax.models.towers import use_size

    config = config_lib.base()
    config.model.dtype, config.tokenizer = "float32", "clip_bpe"
    if size.startswith("ALIGN-"):
        use_align(config, size.removeprefix("ALIGN-"), folder)
    else:
        use_size(config.model, size)
    if size.startswith("SigLIP"):
        config.method, config.tokenizer = "siglip", "sentencepiece?lower=true&pad_with_eot=true"
        config.model.image_mean = config.model.image_std = (0.5, 0.5, 0.5)
        config.eval.transform = ("squash",)
        if target == "open_clip":
            config.model.image.act = "gelu"
    tokenizer = make_tokenizer(config.tokenizer)
    config = config_lib.resolve(config, tokenizer)
    method = make_method(config)
    batch = {view.name: np.zeros((2, *view.shape), view.dtype) for view in method.views}

    rng = np.random.default_rng(0)

    def random(path, x):
        if jax.tree_util.keystr(path).endswith(("scale']", "var']")):
            return 0.5 + rng.random(x.shape, np.float32)
        # Kernels of this scale keep the size of activations, in an EfficientNet with a gain for SiLU and excitation.
        gain = 1.5 if config.method == "align" and x.ndim == 4 else 1.0
        return rng.standard_normal(x.shape, np.float32) * (
            gain / math.sqrt(math.prod(x.shape[:-1])) if x.ndim > 1 else 0.1
        )

    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    params, extra = jax.tree_util.tree_map_with_path(random, shapes)
    scale = {"temperature": np.float32(0.5)} if config.method == "align" else {"logit_scale": np.float32(2.0)}
    return Model(config, method, params | scale, extra, tokenizer)


def theirs(folder, target, inputs, out):
    """Computes the embeddings of an exported folder, in the other interpreter."""
    import numpy as np
    import torch
    from PIL import Image

    arrays = np.load(inputs)
    images, texts = [Image.fromarray(x) for x in arrays["images"]], arrays["texts"].tolist()
    if target == "open_clip":
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        pixels = torch.stack([transform(image) for image in images])
        ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
        embed = model.eval().encode_image, model.encode_text
    else:
        import transformers

        model = transformers.AutoModel.from_pretrained(folder).eval()
        pixels = transformers.AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids, of_align = tokens["input_ids"], model.config.model_type == "align"
        mask = {"attention_mask": tokens["attention_mask"]} if of_align else {}
        embed = [lambda x: pooled(model.get_image_features(x)), lambda x: pooled(model.get_text_features(x, **mask))]
    with torch.no_grad():
        z = [
            torch.nn.functional.normalize(f(x).float(), dim=-1).numpy()
            for f, x in zip(embed, (pixels, ids), strict=True)
        ]
    np.savez(
        out, image=z[0], text=z[1], ids=ids.numpy(), parameters=sum(p.numel() for p in model.parameters()), **versions()
    )


def random_images(size):
    """Returns uint8 `[n, size, size, 3]`: large noisy patches of colour, as noise alone looks the same everywhere."""
    import numpy as np

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (IMAGES, 3, 3, 3)).repeat(-(-size // 3), 1).repeat(-(-size // 3), 2)[:, :size, :size]
    return np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


def pooled(features):
    """Returns the tensor of embeddings; transformers 5 wraps it in an object."""
    return getattr(features, "pooler_output", features)


def versions():
    import importlib.metadata

    found = {}
    for name in ("torch", "open_clip_torch", "transformers", "timm"):
        try:
            found[f"version_{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measure(size, target, args, report):
    """Adds a row and returns whether it is within the tolerance."""
    import numpy as np

    from clip_jax.interop.export import export

    start, folder = time.perf_counter(), tempfile.mkdtemp()
    try:
        model = make_model(size, target, folder)
        export(model, target, f"{folder}/model")
        pixels = random_images(model.image_view.size)
        np.savez(f"{folder}/in.npz", images=pixels, texts=TEXTS)
        command = [
            args.torch_python,
            __file__,
            "--theirs",
            f"{folder}/model",
            target,
            f"{folder}/in.npz",
            f"{folder}/out.npz",
        ]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {size} in {target}: " + done.stderr[-2000:])
        found = dict(np.load(f"{folder}/out.npz"))
        z = {"image": model.embed_image(pixels), "text": model.embed_text(TEXTS)}
        differences = {name: float(np.abs(x - found[name]).max()) for name, x in z.items()}
        apart = min(float(np.abs(x[i] - x[j]).max()) for x in z.values() for i in range(len(x)) for j in range(i))
        context = model.config.model.text.context
        ids = model.tokenizer(TEXTS, context)
        compared = np.arange(context) < model.tokenizer.lengths(ids)[:, None]
        same = bool((np.where(compared, ids, 0) == np.where(compared, found["ids"], 0)).all())
        about = {name: str(x) for name, x in found.items() if name.startswith("version_")}
        report.add(**{
            "model": size, "target": target, "parameters": int(found["parameters"]), "apart": apart,
            "same ids": str(same), "seconds": time.perf_counter() - start, **differences, **about,
        })  # fmt: skip
        return max(differences.values()) <= args.tolerance and same
    finally:
        shutil.rmtree(folder)


def main():
    if sys.argv[1:2] == ["--theirs"]:
        return theirs(*sys.argv[2:])
    if sys.argv[1:2] == ["--their-tower"]:
        return parity_towers.theirs(*sys.argv[2:])
    parser = common.make_parser(__doc__, "parity")
    parser.add_argument("--sizes", default=SIZES, help="separated by commas (default: %(default)s)")
    parser.add_argument(
        "--towers", default="", help=f"single towers instead: all, or of {', '.join(parity_towers.TOWERS)}"
    )
    parser.add_argument("--targets", default="open_clip,hf", help="open_clip, hf (default: %(default)s)")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="the interpreter with the libraries (default: this one)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference of entries (default: %(default)s)"
    )
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    report = common.Report(COLUMNS, torch_python=str(pathlib.Path(args.torch_python)), tolerance=args.tolerance)
    report.header()
    if args.towers:
        names = parity_towers.TOWERS if args.towers == "all" else args.towers.split(",")
        within = [parity_towers.measure(name, args, report) for name in names]
        report.write(args.json)
        return 0 if all(within) else 1
    pairs = [(size, target) for size in args.sizes.split(",") for target in args.targets.split(",")]
    # transformers has no CLIP ResNet, open_clip no ALIGN.
    pairs = [pair for pair in pairs if not pair[0].startswith({"hf": "RN", "open_clip": "ALIGN"}[pair[1]])]
    within = [measure(size, target, args, report) for size, target in pairs]
    report.write(args.json)
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(main())
