"""Rewriting captions: prompts, answers, the language models, and columns that resume and that fit their data set."""

import functools
import http.server
import json
import random
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.records import BadRecord
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.columns import ColumnsSource
from clip_jax.errors import UserError
from clip_jax.tools import rewrite as lib
from clip_jax.tools.language_models import Http, NoAnswer, Request, Sampling, make_language_model, offline

IMAGE = np.zeros((2, 2, 3), np.uint8)
CAPTIONS = ["a dog on a beach", "two cats", "", "x => y", "a line\nand another", "one", "a {brace} => b"]


def source(captions=CAPTIONS):
    return MemorySource(
        [
            {"image": IMAGE + i, "texts": [c] if isinstance(c, str) else c, "tags": ["sand"]}
            for i, c in enumerate(captions)
        ]
    )


def echo(requests):
    """Returns the caption and continues, as language models do."""
    return [f" {request.caption}\n\na further one => another" for request in requests]


@pytest.mark.parametrize("family", lib.FAMILIES)
def test_oracle_e_a_prompt_has_nine_lines_and_three_different_demonstrations(family):
    bank = lib.read_demonstrations()[family]
    for seed in range(40):
        for caption in ("a red bus", "x => y\nz"):
            lines = lib.make_prompt(caption, bank, random.Random(seed)).split("\n")
            assert len(lines) == 9 and lines[1::2] == [""] * 4 and sum(line.count("=>") for line in lines) == 4
            assert lines[0] == "write image captions differently," and lines[8] == f"{lib.one_line(caption)} =>"
        shots = [line.split(" => ") for line in lines[2:8:2]]
        assert len({tuple(shot) for shot in shots}) == 3 and all(source != target for source, target in shots)
        if "sets" in bank:
            of = [
                next(k for k, captions in enumerate(bank["sets"]) if {source, target} <= set(captions))
                for source, target in shots
            ]
            assert len(set(of)) == 3, "of three images"
        else:
            assert all(shot in bank["pairs"] for shot in shots)


def test_the_demonstrations_that_come_with_the_package():
    banks = lib.read_demonstrations()
    assert tuple(banks) == lib.FAMILIES and [*banks["coco"]] == ["sets"]
    texts = [text for bank in banks.values() for rows in bank.values() for row in rows for text in row]
    assert all(len(rows) >= 16 for bank in banks.values() for rows in bank.values()) and len(set(texts)) == len(texts)
    assert not any("=>" in text or "\n" in text for text in texts)


def test_oracle_e_an_echo_keeps_the_number_and_order_of_lines():
    found = lib.rewrite(CAPTIONS, "coco", echo)
    assert found == ["a dog on a beach", "two cats", "", "x -> y", "a line and another", "one", "a {brace} -> b"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        (" a cat \n\nb => c", "a cat"),
        ("\n\n a cat", "a cat"),
        ('"a  cat"', "a cat"),
        (" \n", ""),
        ("a => b", ""),
        ("w " * 78, ""),
    ],
)
def test_the_first_line_of_an_answer_counts(answer, expected):
    assert lib.parse(answer) == expected


def test_failures_are_empty_and_counted():
    answers = iter(["fine words", "", "a => b", NoAnswer("no answer within 1 s"), "fine too"])
    failures = lib.Counter()
    found = lib.rewrite(
        ["a"] * 5 + [" "], "human", lambda requests: [next(answers) for _ in requests], failures=failures
    )
    assert found == ["fine words", "", "", "", "fine too", ""]
    assert failures == {"an answer that is no caption": 2, "no answer within 1 s": 1, "empty caption": 1}


def test_randomness_follows_from_seed_family_and_number():
    seen = {}

    def record(requests):
        for request in requests:
            seen.setdefault((request.prompt, request.seed), len(seen))
        return ["a b"] * len(requests)

    lib.rewrite(["x", "y"], "bard", record, 0, numbers=[7, 8])
    lib.rewrite(["y", "x"], "bard", record, 0, numbers=[8, 7])
    assert len(seen) == 2
    lib.rewrite(["x", "x"], "bard", record, 0, numbers=[8, 9])
    lib.rewrite(["x"], "bard", record, 1, numbers=[7])
    lib.rewrite(["x"], "chatgpt", record, 0, numbers=[7])
    assert len(seen) == 6


# Columns


def write(path, llm=echo, captions=CAPTIONS, **options):
    return lib.run(source(captions), str(path), llm, name="echo", batch=3, **options)


def test_columns_hold_the_rewrites_in_the_order_of_captions_and_families(tmp_path):
    def named(requests):
        return [f"{request.caption} {request.family}" for request in requests]

    captions = [["a b", "c d"], ["e f"], []]
    assert not write(tmp_path / "r.jsonl", named, captions, families=("human", "coco"))
    joined = ColumnsSource(source(captions), str(tmp_path / "r.jsonl"))
    assert [joined[i]["rewrites"] for i in range(3)] == [
        ["a b human", "a b coco", "c d human", "c d coco"],
        ["e f human", "e f coco"],
        [],
    ]


@pytest.mark.parametrize("lines", [1, 2, 3, 5, 8])
def test_the_same_command_resumes(tmp_path, lines):
    """It also resumes inside a batch, after a half-written line, with the same randomness for the batch as a whole."""

    def as_a_whole(requests):
        return [f"{request.caption} {requests[0].seed} {k}" for k, request in enumerate(requests)]

    write(tmp_path / "whole.jsonl", as_a_whole)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(whole.splitlines(True)[:lines]) + b'{"of": "12')
    write(part, as_a_whole)
    assert part.read_bytes() == whole and len(whole.splitlines()) == 1 + len(CAPTIONS)
    with pytest.raises(UserError, match="made with another about") as error:
        write(part, seed=1)
    assert "\n" not in str(error.value)


def test_rewrites_of_other_data_are_refused(tmp_path):
    write(tmp_path / "r.jsonl")
    path = str(tmp_path / "r.jsonl")
    for captions, message in ((CAPTIONS[:-1], "another data set"), (CAPTIONS[::-1], "another data set")):
        with pytest.raises(UserError, match=message):
            ColumnsSource(source(captions), path)
    lines = (tmp_path / "r.jsonl").read_bytes().splitlines(True)
    (tmp_path / "r.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match="6 rows, but memory has 7 records"):
        ColumnsSource(source(), path)
    (tmp_path / "r.jsonl").write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(UserError, match="line 2: made of other texts than record 0"):
        ColumnsSource(source(), path)[0]


def test_unreadable_records_have_no_rewrites(tmp_path):
    class Broken(MemorySource):
        def __getitem__(self, index):
            if index == 1:
                raise BadRecord("truncated file")
            return super().__getitem__(index)

    data = Broken([{"texts": ["a b"]}] * 3)
    assert lib.run(data, str(tmp_path / "r.jsonl"), echo, name="echo") == {"unreadable record": 4}
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()[1:]]
    assert [row["rewrites"] for row in rows] == [["a b"] * 4, [], ["a b"] * 4]


# The language models


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Echoes the caption after the last arrow; some words in it cause a failure."""

    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        caption = prompt.splitlines()[-1].removesuffix(" =>")
        self.asked.append((self.path, caption, body))
        status, text = 200, f" {caption} again\nmore"
        if "slow" in caption:
            time.sleep(0.6)
        if "missing" in caption or ("busy" in caption and sum(caption == c for _, c, _ in self.asked) < 2):
            status = 404 if "missing" in caption else 503
        choice = {"message": {"content": text}} if "chat" in self.path else {"text": text}
        answer = {"choices": [] if "empty" in caption else [choice]}
        data = b"<html>" if "nonsense" in caption else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client has given up

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_and_its_failures_counted(endpoint):
    llm = Http(endpoint + "#small", Sampling(0.5, 0.9, 20), timeout=0.3, pause=0.01)
    failures = lib.Counter()
    captions = ["a cat", "slow one", "nonsense here", "empty choices", "missing page", "busy server"]
    found = lib.rewrite(captions, "chatgpt", llm, failures=failures)
    assert found == ["a cat again", "", "", "", "", "busy server again"]
    assert failures == {"no answer within 0.3 s": 1, "an answer without a text": 2, "HTTP status 404": 1}
    times = {caption: sum(caption == c for _, c, _ in Endpoint.asked) for caption in captions}
    assert times == {
        "a cat": 1,
        "slow one": 3,
        "nonsense here": 3,
        "empty choices": 3,
        "missing page": 1,
        "busy server": 2,
    }
    path, _, body = next(x for x in Endpoint.asked if x[1] == "a cat")
    assert path == "/v1/completions" and body["prompt"].count("=>") == 4
    assert {k: body[k] for k in ("model", "temperature", "top_p", "max_tokens")} == dict(
        model="small", temperature=0.5, top_p=0.9, max_tokens=20
    )
    assert isinstance(body["seed"], int)


def test_an_endpoint_for_chats(endpoint):
    assert lib.rewrite(["a cat"], "human", make_language_model(f"http:{endpoint}/chat/completions")) == ["a cat again"]
    assert Endpoint.asked[0][0] == "/v1/chat/completions"


def no_captions(requests):
    return ["a => b"] * len(requests)


@pytest.mark.parametrize(
    "llm, captions, reason",
    [
        (Http("http://127.0.0.1:9/v1", retries=0), ["a b"], "no connection"),
        (no_captions, ["a b"] * 4, "an answer that is no caption: 16"),
    ],
)
def test_without_any_answer_it_ends_with_one_line(tmp_path, llm, captions, reason):
    with pytest.raises(UserError, match=reason) as error:
        lib.run(source(captions), str(tmp_path / "r.jsonl"), llm, name="llm")
    assert "\n" not in str(error.value) and f"has 0 of {len(captions)} records; the same command resumes there" in str(
        error.value
    )


def test_offline_rewrites_use_words_synonyms_and_templates():
    request = functools.partial(Request, "", "a big octopus", words=("sea", "big", "eight arms"))
    found = {
        family: {offline([request(family=family, seed=seed)])[0] for seed in range(60)}
        for family in (*lib.FAMILIES, "other")
    }
    assert all(len(texts) > 3 for texts in found.values()) and found["bard"].isdisjoint(found["coco"])
    together = set().union(*found.values())
    assert any("sea" in text for text in together) and any("large octopus" in text for text in together)
    assert not any("big" in text.replace("a big", "") for text in together), "a word of the caption is not added again"
    assert offline([request(family="bard", seed=3)]) == offline([request(family="bard", seed=3)])
    for family in lib.FAMILIES:
        (text,) = offline([Request("", "a {zzq}", family)])
        assert "{zzq}" in text and "{word" not in text


def test_words_of_a_record():
    record = {"tags": ["sea", "", ":D", "a  b"], "keywords": "fish", "other": None}
    assert lib.words_of(record, ("tags", "keywords", "other", "missing")) == ["sea", "a b", "fish"]


def test_the_rewrites_of_the_package_are_those_of_the_command():
    joined = make_source("emoji?columns=emoji_rewrites")
    assert len(joined) == len(make_source("emoji"))
    for i in (0, 1, 500, len(joined) - 1):
        record = joined[i]
        words = lib.words_of(record, ("tags", "keywords"))
        expected = [
            lib.rewrite(record["texts"], f, offline, 0, numbers=[f"{i} 0"], words=[words])[0] for f in lib.FAMILIES
        ]
        assert record["rewrites"] == expected
    for i in range(0, len(joined), 50):
        assert len(joined[i]["rewrites"]) == 4 and all(len(text.split()) >= 2 for text in joined[i]["rewrites"])


# The command


def test_the_command(tmp_path, capsys):
    Image.fromarray(IMAGE).save(tmp_path / "x.png")
    rows = [
        {"image": "x.png", "caption": "a cat"},
        {"image": "x.png", "caption": "a dog"},
        {"image": "missing.png", "caption": "a cow"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        f"--source={tmp_path}/pairs.jsonl",
        f"--out={tmp_path}/r.jsonl",
        "--llm=offline",
        "--families=bard,own",
    ]
    assert lib.main(arguments) == 2
    assert capsys.readouterr().err == "error: --families: 'own' is unknown; allowed: chatgpt, bard, coco, human\n"
    bank = {"own": {"pairs": [["a", "b"]] * 3}, "bard": {"sets": [["a", "b", "c"]] * 3}}
    (tmp_path / "own.json").write_text(json.dumps(bank))
    assert lib.main([*arguments, f"--demonstrations={tmp_path}/own.json"]) == 0
    assert "3 records; 2 rewrites of this run are empty. unreadable record: 2" in capsys.readouterr().out
    joined = ColumnsSource(make_source(f"{tmp_path}/pairs.jsonl"), f"{tmp_path}/r.jsonl")
    assert all(len(joined[i]["rewrites"]) == 2 for i in range(2)) and "a cat" in joined[0]["rewrites"][1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--llm=gpt"], "--llm=gpt: allowed are http://HOST:PORT/v1[#MODEL], transformers:MODEL, offline"),
        (
            ["--llm=transformers:x"],
            "--llm=transformers:x: transformers is not installed: pip install torch transformers",
        ),
        (["--llm=offline", "--batch=0"], "--batch=0: must be at least 1"),
        (["--llm=offline", "--out=r.txt"], "r.txt: the name of a file of texts ends in .jsonl"),
        (
            ["--llm=http://localhost:1/v1", "--temperature=-1"],
            "--temperature=-1.0 must be at least 0, --top-p=0.95 above 0 and at most 1, --max-tokens=77 at least 1",
        ),
        (
            ["--llm=offline", "--top-p=0.9"],
            "--top-p is for --llm=http or --llm=https or --llm=transformers, not --llm=offline",
        ),
        (
            ["--llm=transformers:x", "--timeout=1"],
            "--timeout is for --llm=http or --llm=https, not --llm=transformers:x",
        ),
        (["--llm=https://host/v1", "--words=tags"], "--words is for --llm=offline, not --llm=https://host/v1"),
        (["--llm=offline", "--demonstrations=no.json"], "demonstrations no.json: not JSON of"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "pairs.jsonl").write_text('{"image": "x.png", "caption": "a"}\n')
    assert lib.main(["--source=pairs.jsonl", "--out=r.jsonl", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "bank", ['{"a": {"pairs": [["x", "y"]]}}', '{"a": {"pairs": [["x", "y", "z"]]}}', '{"a": []}', "[]", "{"]
)
def test_wrong_demonstrations_are_one_line(tmp_path, bank):
    path = tmp_path / "bank.json"
    path.write_text(bank)
    with pytest.raises(UserError, match="demonstrations .*bank.json") as error:
        lib.read_demonstrations(str(path))
    assert "\n" not in str(error.value)
