"""Single towers of other libraries with random weights, stored by them and loaded by us: part of `parity.py`.

Published widths and depths, vocabularies of single letters. Vision transformers get images of two sizes, so that their
position embeddings are resized; ResNets one. Text towers are sentence transformers, mean-pooled and of unit length.
Image embeddings have unit length here too. Every parameter and running statistic is random.
"""

import json
import os
import pathlib
import shutil
import string
import subprocess
import sys
import tempfile
import time

TEXTS = ["a photo of a cat", "Hello, World!", "zwoelf  Boxkaempfer & a <dog>", "an astronaut riding a horse " * 7]
#: Name: (library, sizes of the images in pixels, or () for a text tower).
TOWERS = {
    "resnet50/torchvision": ("torchvision", (224,)),
    "resnet50": ("timm", (224,)),
    "vit_base_patch16_224": ("timm", (224, 160)),
    "deit3_small_patch16_224": ("timm", (224, 160)),
    "vit_small_patch14_dinov2": ("timm", (518, 224)),
    "vit_small_patch14_reg4_dinov2": ("timm", (518, 224)),
    "ViTModel": ("transformers", (224, 160)),
    "Dinov2Model": ("transformers", (518, 224)),
    "Dinov2WithRegistersModel": ("transformers", (518, 224)),
    "BertModel": ("sentence_transformers", ()),
    "MiniLM-L6": ("sentence_transformers", ()),
    "MPNetModel": ("sentence_transformers", ()),
}


def theirs(name, folder, out):
    """Makes the tower, stores it in `folder` and its inputs and outputs in `out`, in the other interpreter."""
    import importlib.metadata

    import numpy as np
    import torch

    library, sizes = TOWERS[name]
    torch.manual_seed(0)
    found = {f"version_{p}": importlib.metadata.version(p) for p in ("torch", library.replace("_", "-"))}
    # torchvision may have been built for another PyTorch; its models need none of its own operators.
    register, torch.library.register_fake = torch.library.register_fake, lambda *a, **k: lambda f: f
    import torchvision

    torch.library.register_fake = register
    with torch.no_grad():
        if sizes:
            model, embed = image_model(name, library, folder, torch, torchvision)
            for size in sizes:
                x = torch.randn(3, 3, size, size)
                found |= {f"x{size}": x.numpy(), f"y{size}": torch.nn.functional.normalize(embed(x), dim=-1).numpy()}
        else:
            model = text_model(name, folder, torch)
            found["y"], found["ids"] = model.encode(TEXTS), model.tokenize(TEXTS)["input_ids"].numpy()
    np.savez(out, parameters=sum(p.numel() for p in model.parameters()), **found)


def shaken(model, torch):
    """Makes every parameter and running statistic of a model random, and returns it in evaluation mode."""
    for path, x in [*model.named_parameters(), *model.named_buffers()]:
        if not x.is_floating_point():
            continue
        noise = torch.randn_like(x)
        if path.endswith("running_var") or x.ndim == 1 and path.endswith(("weight", "gamma", "lambda1")):
            x.data = 0.5 + torch.rand_like(x)
        else:
            x.data = noise / x[0].numel() ** 0.5 if x.ndim > 1 else 0.1 * noise
    return model.eval()


def image_model(name, library, folder, torch, torchvision):
    """Returns `(model, function of normalised images [b, 3, h, w])`, stored in the layout of its library."""
    if library == "torchvision":
        model = shaken(torchvision.models.resnet50(), torch)
        torch.save(model.state_dict(), f"{folder}/pytorch_model.bin")
        model.fc = torch.nn.Identity()
        return model, model
    if library == "timm":
        import timm

        options = dict(dynamic_img_size=True) if "resnet" not in name else {}
        model = shaken(timm.create_model(name, **options), torch)
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        return model, lambda x: model.forward_head(model.forward_features(x), pre_logits=True)
    import transformers

    kind = getattr(transformers, name)
    options = {} if name == "ViTModel" else dict(image_size=518, patch_size=14, hidden_size=384, num_attention_heads=6)
    model = shaken(kind(kind.config_class(**options)), torch)
    model.save_pretrained(folder)
    return (
        model,
        lambda x: (
            model(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            if name == "ViTModel"
            else (model(x).last_hidden_state[:, 0])
        ),
    )


def text_model(name, folder, torch):
    """Returns the sentence transformer, stored in the layout of its library."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    letters = string.ascii_lowercase + string.punctuation
    letters = [*letters, *(f"##{x}" for x in letters)]
    mpnet = name == "MPNetModel"
    first = (
        ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
        if mpnet
        else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    )
    pathlib.Path(f"{folder}/vocab.txt").write_text("\n".join(first + letters))
    kind, tokenizer = ("MPNetModel", "MPNetTokenizerFast") if mpnet else ("BertModel", "BertTokenizerFast")
    kind = getattr(transformers, kind)
    options = dict(vocab_size=len(first + letters))
    options |= dict(max_position_embeddings=514, layer_norm_eps=1e-5) if mpnet else {}
    if name == "MiniLM-L6":
        options |= dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    shaken(kind(kind.config_class(**options)), torch).save_pretrained(folder)
    getattr(transformers, tokenizer)(vocab=f"{folder}/vocab.txt").save_pretrained(folder)
    width = options.get("hidden_size", 768)
    model = SentenceTransformer(modules=[Transformer(folder, max_seq_length=256), Pooling(width), Normalize()])
    shutil.rmtree(folder)
    model.save(folder)
    return model.eval()


def measure(name, args, report):
    """Adds a row and returns whether it is within the tolerance."""
    import numpy as np

    start, (library, sizes), folder = time.perf_counter(), TOWERS[name], tempfile.mkdtemp()
    try:
        (pathlib.Path(folder) / "model").mkdir()
        path, out = f"{folder}/model", f"{folder}/out.npz"
        command = [
            args.torch_python,
            str(pathlib.Path(__file__).with_name("parity.py")),
            "--their-tower",
            name,
            path,
            out,
        ]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {name} of {library}: " + done.stderr[-2000:])
        found = dict(np.load(out))
        pairs, same = (image_pairs(path, sizes, found), None) if sizes else text_pairs(path, found)
        difference = max(float(np.abs(ours - y).max()) for ours, y in pairs)
        apart = min(float(np.abs(y[i] - y[j]).max()) for _, y in pairs for i in range(len(y)) for j in range(i))
        report.add(**{
            "model": name, "target": library, "parameters": int(found["parameters"]), "apart": apart,
            "image" if sizes else "text": difference, "same ids": None if same is None else str(same),
            "seconds": time.perf_counter() - start,
            **{key: str(x) for key, x in found.items() if key.startswith("version_")},
        })  # fmt: skip
        return difference <= args.tolerance and same is not False
    finally:
        shutil.rmtree(folder)


def image_pairs(path, sizes, found):
    """Returns `[(our unit rows, theirs)]`, one for each size."""
    import jax
    import numpy as np

    from clip_jax.interop.towers.load import tower_variables
    from clip_jax.interop.towers.recognize import recognize
    from clip_jax.models.common import l2_normalize
    from clip_jax.models.towers import image_tower

    pairs = []
    for size in sizes:
        foreign = recognize(path)
        if "resnet" in json.dumps(foreign.config.model.image.kind):
            foreign.config.model.image.size = size
        variables = tower_variables(foreign, size)
        tower = image_tower(foreign.config.model, tokens=False)
        ours = l2_normalize(jax.jit(tower.apply)(variables, found[f"x{size}"].transpose(0, 2, 3, 1))[0])
        pairs.append((np.asarray(ours), found[f"y{size}"]))
    return pairs


def text_pairs(path, found):
    """Returns `([(our unit rows, theirs)], whether the tokenizers agree)`."""
    from clip_jax.methods.tower_encoders import TextTower

    encoder = TextTower(path, TextTower.stored_config(path))
    encoder.load(None)
    ids = encoder._tokenizer(TEXTS, found["ids"].shape[1])
    return [(encoder.embed_text(TEXTS), found["y"])], bool((ids == found["ids"]).all())
