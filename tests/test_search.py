"""Search: exact top-k on all devices, its memory, the index on disk, queries, the command and its page, wrong input."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import sys
import threading

import jax
import numpy as np
import PIL.Image
import pytest
from data_helpers import encoded, write_tar
from helpers import Page, tiny_config

import clip_jax
from clip_jax import search, search_index, search_server, train
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.errors import UserError
from clip_jax.runtime import sharding


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("search")
    train.train(tiny_config("train.steps=2", "checkpoint.steps=1", "model.text.pool=mean"), workdir, lambda line: None)
    return workdir


@pytest.fixture(scope="session")
def model(workdir):
    return clip_jax.load(workdir)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        image = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 24))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i // 2} <&>")
    return folder


def mesh(devices):
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])


def unit(n, e=16, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, e)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("n, k, q", [(1, 3, 1), (7, 7, 2), (1000, 10, 300), (4099, 50, 3)])
def test_the_search_is_exact_on_any_number_of_devices(devices, n, k, q, monkeypatch):
    monkeypatch.setattr(search_index, "_BLOCK", 128)
    search_index.program.cache_clear()
    z, queries = unit(n), unit(q, seed=1)
    rows, values = search_index.Bank(z, mesh(devices)).search(queries, k)
    scores = queries @ z.T
    assert rows.shape == values.shape == (q, min(k, n)) and rows.dtype == np.int32
    np.testing.assert_allclose(values, -np.sort(-scores, axis=1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, rows, 1), values, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in rows.tolist())
    search_index.program.cache_clear()


def test_the_lower_row_comes_first_among_equal_scores():
    z = np.repeat(unit(2), [20, 30], axis=0)[np.random.default_rng(0).permutation(50)]
    for devices in (1, 8):
        rows, values = search_index.Bank(z, mesh(devices)).search(z[:1], 40)
        same = np.flatnonzero((z == z[0]).all(1))
        assert rows[0, : len(same)].tolist() == same.tolist()
        assert sorted(rows[0, len(same) :]) == rows[0, len(same) :].tolist()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_million_embeddings_are_searched_without_their_matrix_of_scores(devices):
    n, e, q, on = 2**20, 512, 256, mesh(devices)
    bank = jax.ShapeDtypeStruct((n, e), np.float32, sharding=sharding.batch_sharding(on))
    compiled = search_index.program(on, 100).lower(bank, jax.ShapeDtypeStruct((q, e), np.float32), 10**6).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < n * e * 4 / devices + 2**20
    assert (
        memory.temp_size_in_bytes < 2**26 < q * n * 4 / devices
    )  # neither a copy of the bank, nor the scores of all its rows


def test_queries_are_unit_vectors_of_sums_and_differences(model):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    cat, red, big, dog = model.embed_text(["a cat", "red", "big", "a dog"])
    z_image = model.embed_image([image])[0]
    plain = search.make_queries(model, ["a cat"], [("q.png", image)])
    np.testing.assert_allclose([q.z for q in plain], [cat, z_image], atol=1e-6)
    text, both = search.make_queries(model, ["a cat"], [("q.png", image)], ["red", "big"], ["a dog"])
    for query, z in ((text, cat), (both, z_image)):
        expected = z + red + big - dog
        np.testing.assert_allclose(query.z, expected / np.linalg.norm(expected), atol=1e-5)
    assert (text.label, both.label) == ("a cat + red + big - a dog", "q.png + red + big - a dog")


def test_the_index_holds_every_usable_image_and_every_text_once(model, photos):
    (photos / "3.png").write_bytes(b"broken")
    (photos / "9.ppm").write_bytes(b"P6")
    source = make_source(str(photos))
    images = search.make_index(model, source, "images", str(photos))
    assert images.where.tolist() == [[i, 0] for i in range(9) if i != 3]
    assert images.skipped == {"corrupt image": 1, "image that ends in .ppm": 1}
    np.testing.assert_allclose(images.z[3], model.embed_image([source[4]["image"]])[0], atol=1e-5)
    texts = search.make_index(model, source, "texts", str(photos))
    assert texts.where.tolist() == [[i, 0] for i in (0, 2, 4, 6, 8)]
    np.testing.assert_allclose(texts.z, model.embed_text([f"number {i} <&>" for i in range(5)]), atol=1e-5)


def make_index(model, photos, **options):
    """Returns the index and whether it was computed."""
    lines = []
    index = search.make_index(model, make_source(str(photos)), "images", str(photos), log=lines.append, **options)
    return index, any("embedded" in line for line in lines)


def test_embeddings_are_kept_next_to_the_data_until_data_or_weights_change(model, workdir, photos):
    first, is_new = make_index(model, photos)
    assert is_new and [path.name for path in photos.parent.iterdir() if path.name == "cache"] == []
    (place,) = (photos / ".clip_jax_search").iterdir()
    again, is_new = make_index(model, photos)
    assert not is_new and np.array_equal(again.z, first.z) and isinstance(again.z, np.memmap)
    earlier, is_new = make_index(clip_jax.load(workdir, 1), photos)
    assert is_new and not np.allclose(earlier.z, first.z) and not make_index(model, photos)[1]
    PIL.Image.new("RGB", (9, 9)).save(photos / "9.png")  # one more image
    assert make_index(model, photos)[1] and len(make_index(model, photos)[0].z) == 10
    PIL.Image.new("RGB", (9, 9), "red").save(photos / "9.png")  # another image of the same name
    assert make_index(model, photos)[1] and not make_index(model, photos)[1]
    (place / "meta.json").write_text("{")
    assert make_index(model, photos)[1]
    assert len(list((photos / ".clip_jax_search").iterdir())) == 2  # one of each checkpoint, nothing left over


def test_a_changed_file_of_a_range_or_behind_a_link_is_noticed(photos, tmp_path):
    """More records than the fingerprint reads, so the files' sizes and times tell."""
    records = [{"image": np.zeros((4, 4, 3), np.uint8), "texts": ["same"]}] * 2
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "photos").symlink_to(photos)
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(b"old")
    for spec, file in ((f"{tmp_path}/{{0..1}}.tar", tmp_path / "1.tar"), (str(tmp_path / "linked"), photos / "9.txt")):
        before = search_index.data_key(MemorySource(records), spec, "train")
        file.write_bytes(b"newer")
        assert search_index.data_key(MemorySource(records), spec, "train") != before


def test_embeddings_of_remote_data_are_kept_until_an_object_changes(model, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    memory, source = fsspec.filesystem("memory"), "memory://test_search/{0..1}.tar"
    for name in "01":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encoded(int(name))), (f"{name}.txt", b"a cat")])
        memory.pipe_file(f"/test_search/{name}.tar", (tmp_path / f"{name}.tar").read_bytes())
    assert make_index(model, source)[1] and not make_index(model, source)[1]
    (place,) = (tmp_path / "cache" / "search").iterdir()
    assert place.name.startswith("images-") and not (tmp_path / ".clip_jax_search").exists()
    memory.pipe_file("/test_search/1.tar", (tmp_path / "1.tar").read_bytes() + bytes(512))
    assert make_index(model, source)[1]
    memory.rm_file("/test_search/1.tar")
    records = MemorySource([{"texts": []}])
    missing = search_index.data_key(records, source, "train")
    memory.pipe_file("/test_search/1.tar", b"")
    assert search_index.data_key(records, source, "train") != missing


@pytest.mark.parametrize("meta", ['{"name": "my notes"}', "{", "[]", None])
def test_a_folder_that_is_no_index_stays_as_it_is(meta, tmp_path):
    ours = json.dumps(dict.fromkeys(("version", "kind", "model", "data", "shape", "skipped"), 1))
    search_index.check_folder(tmp_path)
    (tmp_path / "meta.json").write_text(ours)
    search_index.check_folder(tmp_path)
    (tmp_path / "meta.json").write_text(meta or ours)
    if meta is None:
        (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than an index; name a new folder"):
        search_index.check_folder(tmp_path)


def test_a_damaged_index_is_replaced(model, photos, tmp_path):
    folder = tmp_path / "index"
    first, _ = make_index(model, photos, folder=folder)
    os.truncate(folder / "z.f32", 8)
    again, is_new = make_index(model, photos, folder=folder)
    assert is_new and len(again.z) == 9 and not make_index(model, photos, folder=folder)[1]


def test_other_files_beside_an_index_do_not_hide_it(model, workdir, photos, tmp_path):
    folder = tmp_path / "index"
    make_index(model, photos, folder=folder)
    (folder / ".DS_Store").write_text("mine")
    search_index.check_folder(folder)
    assert not make_index(model, photos, folder=folder)[1]
    with pytest.raises(UserError, match="was made with another checkpoint"):
        make_index(clip_jax.load(workdir, 1), photos, folder=folder)
    os.truncate(folder / "z.f32", 8)
    with pytest.raises(UserError, match="holds something else than an index"):
        make_index(model, photos, folder=folder)


def test_other_files_at_the_usual_place_stay_and_no_folder_is_renamed(model, photos, monkeypatch):
    monkeypatch.setattr(os, "rename", None)
    make_index(model, photos)
    (place,) = (photos / ".clip_jax_search").iterdir()
    (place / "meta.json").unlink()
    (place / ".DS_Store").write_text("mine")
    assert make_index(model, photos)[1] and not make_index(model, photos)[1]
    assert {path.name for path in place.iterdir()} == {"z.f32", "where.i64", "meta.json", ".DS_Store"}


def test_an_interrupted_index_does_not_take_its_folder(model, photos, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as after kill -9
    with monkeypatch.context() as killed, pytest.raises(ZeroDivisionError):
        killed.setattr(model, "embed_image", lambda images: 1 / 0)
        make_index(model, photos, folder=folder)
    assert make_index(model, photos, folder=folder)[1] and not make_index(model, photos, folder=folder)[1]


def test_an_index_of_another_checkpoint_or_other_data_is_refused(model, workdir, photos, tmp_path):
    assert (
        make_index(model, photos, folder=tmp_path / "index")[1]
        and not make_index(model, photos, folder=tmp_path / "index")[1]
    )
    with pytest.raises(UserError, match="was made with another checkpoint"):
        make_index(clip_jax.load(workdir, 1), photos, folder=tmp_path / "index")
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other" / "3.txt").write_text("another text")
    with pytest.raises(UserError, match="was made of another data set"):
        make_index(model, tmp_path / "other", folder=tmp_path / "index")
    with pytest.raises(UserError, match="was made of images, not of texts"):
        search.make_index(model, make_source(str(photos)), "texts", str(photos), folder=tmp_path / "index")


def run(workdir, photos, *arguments):
    return search.main([f"--checkpoint={workdir}", f"--images={photos}", *arguments])


def test_the_command_finds_images_and_writes_a_page(workdir, model, photos, tmp_path, capsys):
    page = tmp_path / "found.html"
    arguments = [
        "--text=<b>cat",
        f"--image={photos}/4.png",
        "--image=#6",
        "--k=4",
        f"--html={page}",
        f"--json={tmp_path}/found.json",
    ]
    assert run(workdir, photos, *arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [q["query"] for q in found] == ["<b>cat", f"{photos}/4.png", "#6 number 3 <&>"]
    assert [[hit["record"] for hit in q["found"]][0] for q in found[1:]] == [4, 6]  # an image is most similar to itself
    assert found[1]["found"][0]["score"] == pytest.approx(1, abs=1e-4) and found[1]["found"][0]["path"].endswith(
        "4.png"
    )
    z = model.embed_image([(photos / f"{i}.png").read_bytes() for i in range(9)])
    best = np.argsort(-(z @ model.embed_text(["<b>cat"])[0]))[:4]
    assert [hit["record"] for hit in found[0]["found"]] == best.tolist()
    assert all(
        f"{rank:>4}  {hit['score']:6.3f}  #{hit['record']}" in printed for rank, hit in enumerate(found[0]["found"], 1)
    )
    text = page.read_text()
    assert (
        text.lower().startswith("<!doctype html>")
        and "<b>cat" not in text
        and "&lt;b&gt;cat" in text
        and "number 2 &lt;&amp;&gt;" in text
    )
    assert len(re.findall('<i class="t t[012]"', text)) == 3 * 4 + 2  # results, and the queries that are images
    sheets = re.findall(r"data:image/webp;base64,([\w+/=]+)", text)
    sizes = [PIL.Image.open(io.BytesIO(base64.b64decode(sheet))).size for sheet in sheets]
    assert sizes == [(4 * 256, 256), (5 * 256, 256), (5 * 256, 256)]
    parsed = Page(text)
    (address, *_) = [a["href"] for a in parsed.find("a") if a["href"].startswith("file:")]
    assert address == (photos / f"{best[0]}.png").as_uri()
    assert f"32 × 24 number {best[0] // 2} <&> {best[0]}.png #{best[0]} {photos}" in parsed.text
    assert f"Searched 9 images of {photos} Checkpoint {workdir}, step 2 Model clip, " in parsed.text


def test_the_command_finds_texts_of_the_data_or_of_a_file(workdir, model, photos, tmp_path, capsys):
    assert run(workdir, photos, "--image=#2", "--find=texts", "--k=2", f"--json={tmp_path}/found.json") == 0
    z = (
        model.embed_text([f"number {i} <&>" for i in range(5)])
        @ model.embed_image([(photos / "2.png").read_bytes()])[0]
    )
    hits = json.loads((tmp_path / "found.json").read_text())[0]["found"]
    assert [hit["text"] for hit in hits] == [f"number {i} <&>" for i in np.argsort(-z)[:2]]
    (tmp_path / "lines.txt").write_text("a cat\n\na dog\n")
    arguments = ["--text=a dog", "--find=texts", f"--texts={tmp_path}/lines.txt", f"--html={tmp_path}/x.html"]
    assert run(workdir, photos, *arguments, f"--json={tmp_path}/found.json") == 0
    assert [hit["text"] for hit in json.loads((tmp_path / "found.json").read_text())[0]["found"]] == ["a dog", "a cat"]
    assert "a dog" in capsys.readouterr().out and "a cat" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_text_and_names_that_cannot_be_encoded(workdir, photos, tmp_path, monkeypatch, encoding):
    folder = os.fsencode(photos) + b"/rou\xe9"
    os.mkdir(folder)
    shutil.copy(photos / "0.png", folder + b"/a.png")
    (photos / "0.png").rename(tmp_path / "1.png")
    (tmp_path / "table.jsonl").write_text('{"image": "1.png", "caption": "red \\ud83d"}\n')
    page, found = tmp_path / "found.html", tmp_path / "found.json"
    sources = {os.fsdecode(folder): "rou?/a.png", str(photos): "rou?/a.png", str(tmp_path / "table.jsonl"): "red ?"}
    for source, printed in sources.items():
        out = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", out)
        assert run(workdir, source, "--text=red \udce9", f"--html={page}", f"--json={found}") == 0
        out.flush()
        lines = out.buffer.getvalue().decode(encoding)
        assert printed in lines and "red ?" in lines
        assert json.loads(found.read_text())[0]["found"] and "> red ?</h3>" in page.read_text()
        page.unlink()
        found.unlink()


def test_the_files_are_written_before_anything_is_printed(workdir, photos, tmp_path):
    page, found = tmp_path / "found.html", tmp_path / "found.json"
    flags = [f"--checkpoint={workdir}", f"--images={photos}", "--text=red", f"--html={page}", f"--json={found}"]

    def log(line):
        if line.startswith("   1  "):
            assert page.is_file() and found.is_file()
            raise UnicodeEncodeError("ascii", line, 0, 1, "the terminal is gone")

    with pytest.raises(UnicodeEncodeError):
        search.search(search.make_parser().parse_args(flags), log)


@pytest.fixture
def served(workdir, photos, monkeypatch):
    """A function `(method, path, body, headers) -> (status, content type, bytes)` of the command with `--serve=0`."""
    opened, ready = [], threading.Event()
    make = search_server.open_server
    monkeypatch.setattr(search_server, "open_server", lambda port: opened.append(make(port)) or opened[0])
    flags = [f"--checkpoint={workdir}", f"--images={photos}", "--serve=0", "--k=3"]
    arguments = search.make_parser().parse_args(flags)
    thread = threading.Thread(
        target=search.search, args=(arguments, lambda line: ready.set() if "search page: http" in line else None)
    )
    thread.start()
    assert ready.wait(60)

    def ask(method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", opened[0].server_port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read()

    yield ask
    opened[0].shutdown()
    thread.join(30)
    assert not thread.is_alive()


def test_the_search_page_answers_texts_and_uploads_on_this_machine_alone(served, photos):
    status, kind, start = served("GET", "/")
    page = Page(start.decode())
    assert (status, kind) == (200, "text/html; charset=utf-8") and page.find("form", action="/", method="post")
    assert not page.find("div", class_="picture") and f"9 images of {photos}" in page.text
    status, _, content = served("GET", "/?text=%3Cb%3Ecat&plus=red")
    page = Page(content.decode())
    assert "<b>cat + red" in page.text and len(page.find("div", class_="picture")) == 3
    assert page.find("input", name="text")[0]["value"] == "<b>cat"

    data = (photos / "4.png").read_bytes()
    parts = {'name="text"': b"not this", 'name="minus"': b"", 'name="image"; filename="my <i>.png"': data}
    body = b"".join(
        b"--frame\r\nContent-Disposition: form-data; " + name.encode() + b"\r\n\r\n" + value + b"\r\n"
        for name, value in parts.items()
    )
    form = {"Content-Type": "multipart/form-data; boundary=frame"}
    status, _, content = served("POST", "/", body + b"--frame--\r\n", form)
    page = Page(content.decode())
    addresses = [a["href"] for a in page.find("a") if "/picture/" in a["href"]]
    assert status == 200 and addresses[0] == "/picture/4" and "my <i>.png" in page.text
    assert served("GET", addresses[0]) == (200, "image/png", data)
    similar = Page(served("GET", "/?record=4")[2].decode())
    assert [a["href"] for a in similar.find("a")][2:5] == ["/picture/4", "/picture/4", "/?record=4"]

    broken = served("POST", "/", body.replace(data, b"no picture") + b"--frame--\r\n", form)
    assert broken[0] == 400 and "my <i>.png: corrupt image" in Page(broken[2].decode()).text
    assert served("GET", "/?minus=snow")[0] == served("GET", "/?record=99")[0] == 400
    assert served("GET", "/picture/99")[0] == served("GET", "/etc/passwd")[0] == 404
    assert served("POST", "/", b"text=a", {"Content-Type": "text/plain"})[0] == 400
    assert served("POST", "/", b"", {"Content-Length": str(2**40)})[0] == 413
    assert served("GET", "/", headers={"Host": "elsewhere.example:80"})[0] == 403


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--serve=99999"], "--serve=99999: ports go up to 65535"),
        ([], "no query: give --text or --image"),
        (["--text=a", "--k=0"], "--k=0: must be at least 1"),
        (["--text=a", "--texts=x"], "--texts needs --find=texts"),
        (
            ["--text=a", "--find=texts", "--texts=/nowhere"],
            "--texts=/nowhere cannot be read: No such file or directory",
        ),
        (["--image=/nowhere.png"], "--image=/nowhere.png: missing file"),
        (["--image=#9"], "has the records #0 to #8"),
        (["--image={}/0.txt"], "0.txt: corrupt image"),
        (["--text=a", "--checkpoint=/nowhere"], "'/nowhere' is no folder"),
        (["--text=a", "--images=/nowhere"], "/nowhere: no such file or folder"),
        (["--text=a", "--index={}/0.txt/x"], "the embeddings cannot be kept in"),
        (["--text=a", "--index={}"], "holds something else than an index; name a new folder"),
        (["--text=a", "--html={}/0.txt/x"], "cannot be written: File exists"),
    ],
)
def test_wrong_input_is_one_clear_line(workdir, photos, capsys, arguments, message):
    assert run(workdir, photos, *(a.format(photos) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
