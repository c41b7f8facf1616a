"""Class names and labels are matched by name, in zero-shot classification, linear probes and nearest neighbours."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data.class_names import canonical_name, join_classes
from clip_jax.data.sources import MemorySource
from clip_jax.data.views import ImageView
from clip_jax.errors import UserError
from clip_jax.evaluation import linear_probe
from clip_jax.evaluation.class_names import _imagenet_words, imagenet_names, match_classes, names_of
from clip_jax.evaluation.classifier import make_classifier
from clip_jax.evaluation.knn import knn_task
from clip_jax.evaluation.probe import probe_task
from clip_jax.evaluation.prompts import load_templates, resolve_duplicates
from clip_jax.evaluation.tasks import parse_task
from clip_jax.evaluation.zeroshot import zeroshot_task

COLORS = {"dark_red": (150, 0, 0), "lime": (0, 255, 0), "navy": (0, 0, 128), "sky-blue": (90, 180, 255)}
#: Few examples in a fixed order: each takes microseconds, and the suite stays fast.
quick = settings(max_examples=20, deadline=None, derandomize=True)


class ColorModel:
    """Embeds an image as its mean colour and a text as the colour that it names."""

    image_view = ImageView(size=8)

    def embed_image(self, images):
        z = images.astype(np.float32).mean((1, 2)) / 127.5 - 1
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    def embed_text(self, texts):
        plain = {name.replace("_", " ").replace("-", " "): color for name, color in COLORS.items()}
        texts = [text.lower().replace("_", " ").replace("-", " ") for text in texts]
        found = [next((c for name, c in plain.items() if name in text), (255, 255, 255)) for text in texts]
        z = np.asarray(found, np.float32) / 127.5 - 1
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    def similarity(self, z_image, z_text):
        return z_image @ z_text.T


class LowerCaseModel(ColorModel):
    """A model whose tokenizer ignores case."""

    def token_ids(self, texts):
        return np.stack([np.frombuffer(text.lower().ljust(40).encode(), np.uint8) for text in texts])


def image(color, seed=0):
    noise = np.random.default_rng(seed).integers(-9, 10, (8, 8, 3))
    return np.clip(np.asarray(COLORS[color]) + noise, 0, 255).astype(np.uint8)


def source(classes, n=3, name="colors", numbered=False):
    """Records of n images of each class, labelled in the order of `classes`."""
    records = [{"image": image(c, i), "label": label} for label, c in enumerate(classes) for i in range(n)]
    return MemorySource(records, name, class_names=None if numbered else list(classes))


def top1(data, names, model=None, **options):
    return zeroshot_task(model or ColorModel(), data, names, name="z", **options).metrics["z/top1"]


@quick
@given(
    st.permutations(list(COLORS)),
    st.permutations(list(COLORS)),
    st.sampled_from([str, str.upper, str.title]),
    st.sampled_from("_ -"),
)
def test_names_in_any_order_case_and_spelling_give_the_same_accuracy(classes, names, case, separator):
    data = source(classes)
    names = [case(name.replace("_", "-").replace("-", separator)) for name in names]
    assert top1(data, names) == top1(data, None) == 1.0


@quick
@given(
    st.lists(st.text("aAé1_-, ", max_size=4), min_size=1, max_size=6),
    st.lists(st.text("aAé1_-, ", max_size=4), min_size=1, max_size=6),
)
def test_a_name_matches_at_most_one_class_and_never_by_position(classes, names):
    found = match_classes(list(dict.fromkeys(classes)), list(dict.fromkeys(names)))
    assert len(set(found.values())) == len(found)
    assert all(found[c] == c for c in classes if c in names)


def test_a_name_that_matches_two_classes_matches_none():
    assert match_classes(["tench", "Tinca tinca"], ["tench, Tinca tinca"]) == {}
    assert match_classes(["a_b", "a b"], ["a b", "a_b"]) == {"a_b": "a_b", "a b": "a b"}
    assert match_classes(["Ab", "aB", "c"], ["AB", "ab", "C"]) == {"c": "C"}


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (("Fire_Truck", "fire-truck", " FIRE  truck"), "fire truck"),
        (("St. Bernard", "st bernard"), "st bernard"),
        (("Carpenter’s kit", "carpenter's_kit"), "carpenters kit"),
        (("GRADE 2.5", "grade_2.5."), "grade 2.5"),
        (("C++",), "c++"),
        (("...",), "..."),
    ],
)
def test_canonical_names(names, form):
    assert {canonical_name(name) for name in names} == {form}


@quick
@given(
    st.lists(st.lists(st.sampled_from(["cat", "Cat", "c_at", "c at", "c.at", "owl", "OWL"]), unique=True), max_size=4)
)
def test_sources_that_tell_no_spellings_apart_are_joined_by_canonical_name(lists):
    classes, labels, ambiguous = join_classes(lists)
    assert len(set(classes)) == len(classes)
    pairs = [
        (name, label) for names, of in zip(lists, labels, strict=True) for name, label in zip(names, of, strict=True)
    ]
    assert all(canonical_name(classes[label]) == canonical_name(name) for name, label in pairs)
    assert all(len(set(of)) == len(of) for of in labels)  # the classes of one source are never joined
    if all(len(set(map(canonical_name, names))) == len(names) for names in lists):
        assert len(classes) == len({canonical_name(name) for name in classes}) and not ambiguous
    told = {
        form
        for names in lists
        for form in map(canonical_name, names)
        if sum(canonical_name(name) == form for name in names) > 1
    }
    for name, label in pairs:
        if canonical_name(name) in told:
            assert classes[label] == name
    for number, name, others in ambiguous:
        assert name in lists[number] and name not in others and canonical_name(name) in told


@quick
@given(st.lists(st.sampled_from(list(COLORS)), min_size=1, max_size=4, unique=True))
def test_other_counts_list_both_sides(names):
    data = source(["lime", "navy"])
    if sorted(names) == ["lime", "navy"]:
        assert top1(data, names) == 1.0
        return
    with pytest.raises(UserError) as error:
        top1(data, names)
    text = str(error.value)
    assert f"{len(names)} names are given" in text and "for 2 classes ('lime', 'navy')" in text and "\n" not in text


def test_names_that_do_not_match_need_pairs(tmp_path):
    folders = MemorySource(source(["lime", "navy"])._records, "folders", class_names=["c1", "c2"])
    with pytest.raises(UserError, match=r"without a name: 'c1', 'c2'; without a class: 'lime', 'navy'; give pairs"):
        top1(folders, ["lime", "navy"])
    assert top1(folders, {"c2": "navy", "c1": "lime"}) == 1.0
    (tmp_path / "pairs.txt").write_text("c2\tnavy\nc1\tlime\n")
    assert top1(folders, f"{tmp_path}/pairs.txt") == 1.0
    (tmp_path / "pairs.txt").write_text("c2\tnavy\nc1\tlime\nc2\tlime\n")
    with pytest.raises(UserError, match="several names for 'c2'"):
        top1(folders, f"{tmp_path}/pairs.txt")
    (tmp_path / "pairs.txt").write_text("c2\tnavy\nlime\n")
    with pytest.raises(UserError, match="'lime' has no tab"):
        top1(folders, f"{tmp_path}/pairs.txt")
    with pytest.raises(UserError, match="without a name: 'c1'"):
        top1(folders, {"c2": "navy"})
    with pytest.raises(UserError, match="without a class: 'c3'"):
        top1(folders, {"c1": "lime", "c2": "navy", "c3": "dark red"})


def test_numbered_classes_are_named_by_label(tmp_path):
    data = source(["navy", "lime"], numbered=True)
    assert top1(data, ["navy", "lime"]) == top1(data, {1: "lime", 0: "navy"}) == 1.0
    with pytest.raises(UserError, match=r"labels 0\.\.1, but there are names for 0\.\.0"):
        top1(data, ["navy"])
    with pytest.raises(UserError, match=r"pairs of the labels 0\.\.1 and names"):
        top1(data, {1: "lime", 2: "navy"})
    (tmp_path / "names.txt").write_text("\ufeffnavy\n\nlime\n\n")
    with pytest.raises(UserError, match="the name of class 1 is empty"):  # the names after it would move up
        top1(data, f"{tmp_path}/names.txt")
    (tmp_path / "names.txt").write_text("\ufeffnavy\nlime\n\n")
    assert top1(data, f"{tmp_path}/names.txt") == 1.0


def test_imagenet_ids_and_synonyms():
    ids, names = list(imagenet_names()), list(imagenet_names().values())
    assert (len(ids), ids[0], names[0], imagenet_names()["n02099601"]) == (
        1000,
        "n01440764",
        "tench",
        "Golden Retriever",
    )
    shuffled = MemorySource([{}], class_names=ids[::-1])
    assert names_of(shuffled, "imagenet", "z") == names_of(shuffled, None, "z") == names[::-1]
    subset = MemorySource([{}], class_names=["n02099601", "n01440764"])
    assert names_of(subset, None, "z") == ["Golden Retriever", "tench"]
    assert names_of(subset, "imagenet", "z") == ["Golden Retriever", "tench"]
    with pytest.raises(UserError, match="WordNet ids outside of ImageNet's 1,000 classes: 'n00000001'"):
        names_of(MemorySource([{}], class_names=["n00000001", "n01440764"]), None, "z")
    synonyms = ["tench, Tinca tinca", "great white shark, white shark"]
    assert names_of(MemorySource([{}], class_names=synonyms), ["white shark", "tench"], "z") == ["tench", "white shark"]


def imagenet_of(*classes, given="imagenet"):
    return names_of(MemorySource([{}], "data", class_names=list(classes)), given, "z")


def test_imagenet_names_by_number_and_by_name():
    names = list(imagenet_names().values())
    numbers = sorted(map(str, range(1000)))  # as the folders of ImageNet-V2 are listed: 0, 1, 10, 100, ...
    assert imagenet_of(*numbers) == [names[int(number)] for number in numbers]
    assert imagenet_of("7", "999", "0") == [names[7], names[999], names[0]]
    assert imagenet_of("1", "0", given=["cat", "dog"]) == ["dog", "cat"]
    assert imagenet_of("1", "0", given=None) == ["1", "0"]  # digits, as in MNIST
    with pytest.raises(UserError, match="are 1000 numbers, such as '0', which are no names; set classes='imagenet'"):
        imagenet_of(*numbers, given=None)
    german = [f"{name} (de)" for name in names]
    assert imagenet_of("n02099601", "n01440764", given=german) == ["Golden Retriever (de)", "tench (de)"]
    with pytest.raises(UserError, match="none of ImageNet's 1,000 classes: '1000'"):
        imagenet_of("0", "1000")
    imagenette = ["tench", "English_springer", "cassette_player", "chain_saw", "church", "French horn", "gas_pump"]
    found = ["tench", "English Springer Spaniel", "cassette player", "chainsaw", "church", "French horn", "gas pump"]
    assert imagenet_of(*imagenette) == found
    assert imagenet_of("sunglass", "missile", "projectile") == ["sunglasses", "missile", "missile"]
    assert imagenet_of(*_imagenet_words().values()) == names  # "crane" occurs twice there
    with pytest.raises(UserError, match=r"none of ImageNet's 1,000 classes: 'golden_retreiver', 'crane' \(did you"):
        imagenet_of("golden_retreiver", "crane", "goldfish")
    with pytest.raises(UserError, match="classes: 'tench'; name all classes in one way: by WordNet id, by number or"):
        imagenet_of("n01443537", "tench")


def test_the_shipped_names_pass_the_check_for_duplicates():
    data = MemorySource(source(["lime", "navy"])._records, class_names=sorted(imagenet_names()))
    metrics = zeroshot_task(ColorModel(), data, "imagenet", name="z").metrics
    assert metrics["z/classes"] == 1000
    names = list(imagenet_names().values())
    assert resolve_duplicates(names) == (names, list(range(1000)))
    assert len(resolve_duplicates(names, "merge")[0]) == 998
    with pytest.raises(UserError, match="'missile'"):
        resolve_duplicates(["missile", "missile", "my cat"])
    with pytest.raises(UserError, match="'missile'"):
        resolve_duplicates(["missile"] * 3)


def test_duplicates_are_what_the_model_cannot_tell_apart():
    data = MemorySource(source(["lime", "lime", "navy"])._records, class_names=["a", "b", "c"])
    names = {"a": "lime", "b": "LIME", "c": "navy"}
    assert top1(data, names, duplicates="error") < 1  # for this model these are two texts
    with pytest.raises(UserError, match="several classes have the name 'lime' = 'LIME'"):
        top1(data, names, LowerCaseModel())
    with pytest.raises(UserError, match="'lime' = 'LIME'"):
        top1(data, names, canonical=True)
    merged = zeroshot_task(LowerCaseModel(), data, names, name="z", duplicates="merge").metrics
    assert (merged["z/top1"], merged["z/classes"]) == (1.0, 2)


# --- the linear probe and nearest neighbours ---


def probe(train, test, **options):
    return probe_task(ColorModel(), train, test, name="p", features="embedding", **options).metrics


@quick
@given(st.permutations(list(COLORS)), st.lists(st.sampled_from(list(COLORS)), min_size=1, unique=True), st.booleans())
def test_probe_labels_are_matched_by_name(train, test, spaced):
    data = source([*test], n=2, name="test")
    data.class_names = [name.replace("_", " ") if spaced else name for name in test]
    labels = {}

    def fit(z_train, labels_train, z_test, labels_test, **_):
        labels.update(train=labels_train, test=labels_test)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(linear_probe, "linear_probe", fit)
        probe(source(train, n=2), data)
    assert [train[i] for i in labels["test"]] == [name for name in test for _ in range(2)]


@pytest.mark.parametrize(
    "names",
    [5, b"ab", {"a", "b"}, ["a", None], [["a", "b"], "b"], [True, "b"], {"a": None, "b": "b"}, {"a": ["a"], "b": "b"}],
)
def test_class_names_that_are_not_text_are_refused(names):
    named, numbered = MemorySource([{}], class_names=["a", "b"]), MemorySource([{}])
    for data in (named, numbered):
        with pytest.raises(UserError, match="class_names"):
            names_of(data, names, "z")
    assert names_of(numbered, [8, "9"], "z") == ["8", "9"]
    assert names_of(named, {"a": 8, "b": "9"}, "z") == ["8", "9"]
    with pytest.raises(UserError, match="several names for one class"):
        names_of(MemorySource([{}], class_names=["0", "1"]), {0: "zero", "0": "nought", 1: "one"}, "z")


def test_no_class_names_are_refused():
    with pytest.raises(UserError, match="class_names: at least one is needed"):
        make_classifier(ColorModel(), [])


def test_class_names_that_are_not_utf8_are_refused():
    with pytest.raises(UserError, match="colors are not UTF-8: 'caf.udce9'"):
        names_of(MemorySource([{}], "colors", class_names=["caf\udce9", "b"]), None, "z")


@pytest.mark.parametrize(
    "option",
    ["limit='2'", "limit=2.5", "limit=0", "limit=True", "canonical='no'", "source=5", "split=3", "name=''", "label=1"],
)
def test_options_of_a_wrong_type_are_refused(option):
    name, value = option.split("=")
    task = f"zeroshot({option})" if name == "source" else f"zeroshot('data', {option})"
    with pytest.raises(UserError, match=re.escape(f"{name}={value}: ")):
        parse_task(task)
    assert parse_task("zeroshot('data', limit=2, canonical=True, split='val')").options["limit"] == 2


@pytest.mark.parametrize("templates", [5, None, [1], {"{}": 1}, [None]])
def test_templates_that_are_not_text_are_refused(templates):
    with pytest.raises(UserError, match="templates"):
        load_templates(templates)


def test_probe_on_some_of_the_classes_and_on_others():
    train = source(["dark_red", "lime", "navy"], n=10)
    assert probe(train, source(["navy", "dark_red"]))["p/accuracy"] == 1.0
    with pytest.raises(UserError, match="colors has no image of more's classes 'sky-blue'"):
        probe(train, source(["lime", "sky-blue"], name="more"))
    with pytest.raises(UserError, match="colors names its classes .* and plain numbers them"):
        probe(train, source(["lime", "navy"], name="plain", numbered=True))
    numbered = source(["lime", "navy"], n=10, name="plain", numbered=True)
    assert probe(numbered, source(["lime"], numbered=True))["p/accuracy"] == 1.0
    with pytest.raises(UserError, match="plain has no image of three's classes 2"):
        probe(numbered, source(["lime", "navy", "dark_red"], name="three", numbered=True))


def test_the_validation_images_of_the_probe_may_be_a_split(tmp_path, monkeypatch):
    for split, names in (("train", ("lime", "navy")), ("val", ("navy",)), ("test", ("lime", "navy"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(name, split == "test"))
    labels = {}

    def fit(x_train, labels_train, x_test, labels_test, x_val, labels_val):
        labels.update(train=labels_train.tolist(), val=labels_val.tolist(), test=labels_test.tolist())
        return linear_probe.ProbeResult(1.0, 1.0, 1.0, labels_test)

    monkeypatch.setattr(linear_probe, "linear_probe", fit)
    task = parse_task(f"probe('{tmp_path}', '{tmp_path}', val_split='val', features='embedding')")
    task.check_sources()
    task(ColorModel())
    assert labels == {"train": [0, 1], "val": [1], "test": [0, 1]}  # the only class of val is number 0 there
    for options, message in (
        ("val_split='vall'", "vall"),
        ("val_split='train'", "probe: val_split='train': the validation set is the training set"),
        ("val_split='test'", "probe: val_split='test': the validation set is the test set"),
        ("val_split='val', test_split='val'", "probe: val_split='val': the validation set is the test set"),
        ("features=['embedding']", "features=.'embedding'.: allowed are before_projection, embedding"),
    ):
        with pytest.raises(UserError, match=message):
            parse_task(f"probe('{tmp_path}', '{tmp_path}', {options})").check_sources()


def test_nearest_neighbours_have_their_labels_by_name():
    data = source(["navy", "lime"], name="test")
    metrics = knn_task(ColorModel(), source(["dark_red", "lime", "navy"]), data, name="k").metrics
    counts = {"k/images": 6.0, "k/classes": 3.0, "k/skipped": 0.0}
    assert metrics == {"k/top1": 1.0, "k/top5": 1.0, "k/majority_top1": 0.0} | counts
    with pytest.raises(UserError, match="k: colors has no image of more's classes 'sky-blue'"):
        knn_task(ColorModel(), source(["lime"]), source(["lime", "sky-blue"], name="more"), name="k")


def test_probe_of_classes_with_one_name_and_of_large_numbers():
    """Two classes of one name are two classes, where both sources have the same classes."""

    def data(n, names=("crane", "dog", "crane"), numbers=(0, 1, 2), **options):
        records = [{"image": image(c, i), "label": y} for y, c in zip(numbers, COLORS, strict=False) for i in range(n)]
        return MemorySource(records, class_names=names, **options)

    assert probe(data(10), data(3))["p/accuracy"] == 1.0
    with pytest.raises(UserError, match="no image of few's classes 'crane'"):
        probe(data(10), data(3, names=("dog", "crane", "eel"), numbers=(1,), name="few"))
    large = (2_000_000_000, 7, 0)
    result = probe(data(10, None, large), data(3, None, large[:2]))
    assert result["p/accuracy"] == 1.0 and result["p/classes"] == 3
    assert names_of(data(1), ["crane", "dog", "crane"], "z") == ["crane", "dog", "crane"]


@pytest.mark.parametrize("task", ["probe", "knn"])
def test_no_task_tests_on_the_training_images(tmp_path, task):
    for name in ("lime", "navy"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.open(io.BytesIO(png(name, i))).save(tmp_path / name / f"{i}.png")
    for same in (tmp_path, f"{tmp_path}/", f"{tmp_path.parent}/./{tmp_path.name}"):
        with pytest.raises(UserError, match="test set, .* with the split 'train', is the training set"):
            parse_task(f"{task}(train='{tmp_path}', test='{same}', name='x')")(ColorModel())
    with pytest.raises(UserError, match="x: the test set, .* with the split 'train', is the training set"):
        parse_task(f"{task}(train='{tmp_path}', test='{tmp_path}', name='x')").check_sources()
    options = "test_split='train', features='embedding', name='x'"
    asked = parse_task(f"{task}(train='{tmp_path}', test='{tmp_path}', {options})")(ColorModel())
    assert asked.metrics["x/accuracy" if task == "probe" else "x/top1"] == 1.0


def png(color, seed):
    data = io.BytesIO()
    Image.fromarray(image(color, seed)).save(data, "PNG")
    return data.getvalue()
