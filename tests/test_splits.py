"""Which splits data has, and which one is evaluated when none is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax import config, evaluate
from clip_jax.data.records import BadRecord, check_labels
from clip_jax.data.sources.make import make_source
from clip_jax.data.sources.splits import check_split, evaluation_split, list_splits
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import open_source


def folder(path, *names):
    for name in names:
        (path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path / name / "1.png")
    return str(path)


def test_splits_of_a_folder(tmp_path):
    data = folder(tmp_path / "a", "train/cat", "val/cat", ".cache/x", "annotations")
    (tmp_path / "a" / "test").mkdir()  # an empty folder is no split
    (tmp_path / "a" / "annotations" / "1.png").unlink()
    assert list_splits(data) == ["train", "val"]
    with pytest.raises(UserError, match="has no split 'test'; name one of its splits: train, val"):
        open_source(data)
    assert len(open_source(data, "val")) == 1
    assert evaluation_split(folder(tmp_path / "b", "train", "test")) == "test"
    assert evaluation_split(folder(tmp_path / "c", "cat", "dog")) == "train"  # classes
    assert evaluation_split(folder(tmp_path / "d", "val")) == "val"
    assert list_splits(folder(tmp_path / "e", "train2017", "val2017")) == ["train2017", "val2017"]
    ambiguous = folder(tmp_path / "f", "bus", "car", "train")
    for function in (open_source, make_source):
        with pytest.raises(UserError, match="is the sub-folder 'train' a split or a class like bus, car"):
            function(ambiguous)
    assert len(make_source(ambiguous + "/train")) == 1
    with pytest.raises(UserError, match="no split 'train' .did you mean 'train2017'"):
        make_source(str(tmp_path / "e"))
    assert len(make_source(folder(tmp_path / "g" / "train", "bus", "train")[: -len("train")] + "{split}")) == 2


def test_one_folder_above_the_classes_is_no_class(tmp_path):
    """Its top-1 would be 100 %."""
    data = folder(tmp_path / "a", "images/train/cat", "images/train/dog", "images/test/cat")
    captions = make_source(data)
    assert len(captions) == 3 and list(captions.class_names) == ["images"]
    with pytest.raises(UserError, match="the only class is 'images', which holds the folders test, train; .*a/images$"):
        check_labels(captions, "zeroshot")
    assert list_splits(f"{data}/images") == ["test", "train"]
    for classes in (f"{data}/images/train", folder(tmp_path / "b", "cat/1", "dog/1"), folder(tmp_path / "c", "cat/1")):
        check_labels(make_source(classes), "zeroshot")


def test_folders_that_are_links(tmp_path):
    """A subset of a benchmark is often a folder of links to its class folders."""
    classes = folder(tmp_path / "all", "cat", "dog/deep")
    for split in ("train", "val"):
        (tmp_path / "subset" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "subset" / split / name).symlink_to(f"{classes}/{name}")
    (tmp_path / "subset" / "val" / "dog" / "deep" / "again").symlink_to(classes)
    assert list_splits(f"{tmp_path}/subset") == ["train", "val"]
    with pytest.raises(UserError, match="name one of its splits: train, val"):
        open_source(f"{tmp_path}/subset")
    source = make_source(f"{tmp_path}/subset", "val")
    assert source.class_names == ["cat", "dog"]
    assert [record["class_name"] for record in map(source.__getitem__, range(len(source)))] == ["cat", "dog", "dog"]
    (tmp_path / "all" / "top.png").symlink_to("nowhere")
    source = make_source(classes)
    with pytest.raises(BadRecord, match="missing file"):
        source[len(source) - 1]


def test_splits_of_a_pattern(tmp_path):
    for name in ("pets_train.csv", "pets_test.csv", "pets_val-2.csv", "other_x.csv"):
        (tmp_path / name).write_text("image,label\n")
    assert list_splits(f"{tmp_path}/pets_{{split}}.csv") == ["test", "train", "val-2"]
    for split in ("a", "b"):
        (tmp_path / split).mkdir()
        for i in range(3):
            (tmp_path / split / f"{split}-{i:02d}.tar").touch()
    assert list_splits(f"{tmp_path}/{{split}}/{{split}}-{{00..02}}.tar") == ["a", "b"]
    assert list_splits(f"{tmp_path}/{{split}}/*.tar") == list_splits(f"{tmp_path}/{{split}}") == ["a", "b"]
    assert list_splits(f"{tmp_path}/a/a-{{00..02}}.tar") == ["train"]
    for missing in (f"{tmp_path}/no_{{split}}.csv", f"{tmp_path}/no.csv", f"{tmp_path}/a/a-{{00..03}}.tar", "emojii"):
        with pytest.raises(UserError, match="no such file"):
            list_splits(missing)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(names=st.lists(st.from_regex(r"[a-z][a-z0-9.+()-]{0,5}", fullmatch=True), min_size=1, max_size=4, unique=True))
def test_whatever_the_splits_are_called(names, tmp_path_factory):
    root = tmp_path_factory.mktemp("s")
    for name in names:
        (root / f"x[{name}].csv").touch()
    pattern = f"{root}/x[[]{{split}}].csv"
    assert list_splits(pattern) == sorted(names)
    if "test" not in names and len(names) > 1:
        with pytest.raises(UserError, match="name one of its splits"):
            evaluation_split(pattern)
    else:
        assert evaluation_split(pattern) == ("test" if "test" in names else names[0])


def test_an_error_of_the_test_split_is_not_answered_by_the_training_set(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    (tmp_path / "train.csv").write_text("image,label\n1.png,cat\n")
    (tmp_path / "test.csv").write_text("picture_of,label\n1.png,cat\n")
    with pytest.raises(UserError, match="test.csv: no column for the image path"):
        open_source(f"{tmp_path}/{{split}}.csv")


def test_splits_of_data_sets_and_mixtures(tmp_path):
    assert list_splits("scenes?objects=2") == ["train", "val", "test"]
    assert "val_seen_vendor" in list_splits("emoji") and "test" not in list_splits("emoji")
    (tmp_path / "a.csv").write_text("image\n")
    assert list_splits(f"scenes*3 + {tmp_path}/a.csv") == ["train"]
    data = folder(tmp_path / "b", "val", "test")
    assert list_splits(f"scenes + {data}") == ["val", "test"]
    with pytest.raises(UserError, match="no split in common .*train; .*: test, val"):
        list_splits(f"{tmp_path}/a.csv + {data}")
    for address in ("gs://bucket/pairs.manifest.parquet?holdout=0.1", "hf://datasets/a/b/x.parquet", "https://a/b.tar"):
        assert list_splits(address) == ["train"] and evaluation_split(address) == "train"  # found when it is opened
    check_split("emoji", "train[:50%]+val_seen_vendor")
    for split in ("tran", "train+tset"):
        with pytest.raises(UserError, match="emoji: no split"):
            check_split("emoji", split)


def test_splits_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_splits").mkdir()
    (tmp_path / "my_splits" / "named.py").write_text("SPLITS = ('train', 'dev')\ndef make(split): ...\n")
    (tmp_path / "my_splits" / "unnamed.py").write_text("def make(split): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list_splits("my_splits.named") == ["train", "dev"] and list_splits("my_splits.unnamed") is None
    assert evaluation_split("my_splits.unnamed") == "test"


# --- tasks before a run ---


def checked(best="", steps=1, train_tasks=(), tasks=()):
    c = config.base()
    c.checkpoint.best, c.eval.steps, c.eval.tasks, c.eval.train_tasks = best, steps, tuple(tasks), tuple(train_tasks)
    evaluate.check_tasks(c)


def test_tasks_of_one_name_are_refused():
    scenes = "relations(limit={})"
    with pytest.raises(UserError, match=r"eval.tasks: the metrics of .*limit=1.* and .*limit=2.* have the same names"):
        checked(tasks=[scenes.format(1), scenes.format(2)])
    with pytest.raises(UserError, match="such as 'x/image_to_text_R@1'"):  # different tasks share some metrics
        checked(tasks=["retrieval('scenes', name='x')", "relations(name='x')"])
    with pytest.raises(UserError, match="such as 'x/images'"):
        checked(tasks=["retrieval('scenes', name='x')", "probe('scenes', 'scenes', name='x')"])
    checked(tasks=["emoji", "emoji(subset='val')", "emoji(language='ko')", "relations(name='a')", "relations"])
    checked(tasks=["emoji"], train_tasks=["emoji"])  # they are not evaluated together


@pytest.mark.parametrize(
    "best, task",
    [
        ("emoji_val/unseen_concept_unseen_vendor/top1", "emoji(subset='val')"),
        ("-emoji_ko/seen_concept_seen_vendor/pixel_1nn_top5_without_compositions", "emoji(language='ko')"),
        ("scenes/relations_combination", "relations"),
        ("scenes/images_attributes_seen", "relations"),
        ("x/image_to_text_R@5", "retrieval('scenes', name='x')"),
        ("x/top5", "zeroshot('PETS', name='x')"),
        ("x/val_accuracy", "probe('PETS', 'PETS', test_split='train', name='x')"),
        ("x/top1", "knn('PETS', 'PETS', test_split='train', name='x')"),
    ],
)
def test_the_best_metric_is_one_that_a_task_computes(best, task, tmp_path):
    task = task.replace("PETS", folder(tmp_path, "cat", "dog"))
    checked(best, train_tasks=[task])
    checked(best, 0, tasks=[task])
    with pytest.raises(UserError, match="checkpoint.best.*no task of eval.tasks.*did you mean"):
        checked(best + "s", train_tasks=[task])
    with pytest.raises(UserError, match="checkpoint.best"):
        checked(best, steps=0, train_tasks=[task])


def test_a_sign_alone_is_no_metric():
    with pytest.raises(UserError, match="checkpoint.best='-': no task"):
        checked(best="-", tasks=["relations"])


def test_the_command_checks_its_tasks_before_it_loads_the_checkpoint(tmp_path, capsys):
    for tasks, message in (
        (["relations(limit=1)", "relations(limit=2)"], "--task: the metrics of 'relations(limit=1)'"),
        ([f"zeroshot(source='{tmp_path}/pets')"], "pets: no such file or folder"),
        ([f"probe(train='scenes', test='{tmp_path}/no_{{split}}.csv')"], "whatever {split} stands for"),
        (["probe('scenes', 'scenes', features='pixels')"], "features='pixels': allowed are before_projection"),
        (["knn('scenes', 'scenes', k=0)"], "knn: k=0: must be a whole number of at least 1"),
        (["knn('scenes', 'scenes', temperature=-1)"], "knn: temperature=-1: must be a number of at least 0"),
    ):
        assert evaluate.main([f"--checkpoint={tmp_path}/none", *(f"--task={task}" for task in tasks)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
