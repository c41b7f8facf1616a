import gzip
import json
import lzma
import pickle

import numpy as np
import pytest
from conftest import golden_files

from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.base import METADATA_FILE, VOCAB_FOLDER
from clip_jax.errors import UserError
from clip_jax.tools.train_tokenizer import file_texts, main, source_texts, train

BERT_PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat ##s cafe un ##aff ##able , ! [ ] cls 猫 ?".split()


@pytest.fixture(scope="module")
def clip_bpe():
    return make_tokenizer("clip_bpe")


@pytest.fixture(scope="module")
def sentencepiece():
    return make_tokenizer("sentencepiece")


@pytest.fixture
def wordpiece_spec(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_PIECES) + "\n", encoding="utf-8")
    return f"wordpiece:{tmp_path}/vocab.txt"


# --- CLIP BPE ---


@pytest.mark.parametrize("file", golden_files("tokenizer_clip_bpe*.json"))
def test_clip_bpe_golden_ids(file, clip_bpe):
    items = json.loads(file.read_text())["items"]
    assert [item["text"] for item in items if clip_bpe.encode(item["text"]) != item["bpe_ids"]] == []
    length = len(items[0]["ids"])
    np.testing.assert_array_equal(clip_bpe([item["text"] for item in items], length), [item["ids"] for item in items])


@pytest.mark.parametrize("file", golden_files("tokenizer_clip_bpe*.json"))
def test_clip_bpe_golden_ids_of_the_openai_release(file):
    items = json.loads(file.read_text())["items"]
    length = len(items[0]["ids"])
    ids = make_tokenizer("clip_bpe?specials=openai")([item["text"] for item in items], length)
    np.testing.assert_array_equal(ids, [item.get("ids_openai_release", item["ids"]) for item in items])


def test_clip_bpe_constants(clip_bpe):
    assert (clip_bpe.vocab_size, clip_bpe.sot_id, clip_bpe.eot_id, clip_bpe.pad_id, clip_bpe.mask_id) == (
        49408,
        49406,
        49407,
        0,
        None,
    )
    ids = clip_bpe(["hello world"], 8)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[49406, 3306, 1002, 49407, 0, 0, 0, 0]])


def test_clip_bpe_literal_specials():
    text = "a <start_of_text> b <|startoftext|> <end_of_text>!"
    ids = {name: make_tokenizer(f"clip_bpe?specials={name}").encode(text) for name in ("open_clip", "openai", "none")}
    assert ids["open_clip"].count(49406) == 1 and ids["open_clip"].count(49407) == 1
    assert ids["openai"].count(49406) == 1 and ids["openai"].count(49407) == 0
    assert max(ids["none"]) < 49406


def test_clip_bpe_mask_keeps_eot_the_largest_id(clip_bpe):
    masked = make_tokenizer("clip_bpe?mask=true")
    assert (masked.vocab_size, masked.mask_id, masked.sot_id, masked.eot_id) == (49409, 49406, 49407, 49408)
    assert masked.special_ids == {49406, 49407, 49408}
    assert masked.encode("a cat") == clip_bpe.encode("a cat")
    assert masked != clip_bpe


def test_clip_bpe_decode(clip_bpe):
    assert clip_bpe.decode(clip_bpe(["A  café, 고양이!"], 32)[0]) == "a café , 고양이 !"


def test_clip_bpe_reads_an_unpacked_vocabulary(tmp_path, clip_bpe):
    (tmp_path / "bpe.txt").write_bytes(gzip.decompress((VOCAB_FOLDER / "bpe_simple_vocab_16e6.txt.gz").read_bytes()))
    assert make_tokenizer(f"clip_bpe:{tmp_path}/bpe.txt").encode("it's 3 cats") == clip_bpe.encode("it's 3 cats")


# --- SentencePiece ---


def test_sentencepiece_shipped_model(sentencepiece):
    assert (sentencepiece.vocab_size, sentencepiece.pad_id, sentencepiece.eot_id, sentencepiece.mask_id) == (
        4096,
        0,
        1,
        4,
    )
    assert sentencepiece.sot_id is None
    assert sentencepiece.encode("Red APPLE") == sentencepiece.encode("red  apple")
    for text in ("a red apple", "woman firefighter", "문어", "𓀀 \U0001f419"):  # the last two only through bytes
        ids = sentencepiece.encode(text)
        assert sentencepiece.decode(ids) == text
        assert 2 not in ids  # <unk>
    assert len(sentencepiece.encode("smiling face with sunglasses")) <= 5


def test_sentencepiece_text_cannot_spell_control_symbols(sentencepiece):
    assert not sentencepiece.special_ids & set(sentencepiece.encode("</s> <pad> <s> <mask>"))


def test_sentencepiece_options(sentencepiece):
    plain = sentencepiece.encode("red apple")
    context = len(plain) + 4
    sot = make_tokenizer("sentencepiece?sot=true")
    assert sot.sot_id == 3
    assert sot(["red apple"], context)[0].tolist() == [3, *plain, 1, 0, 0]
    sticky = make_tokenizer("sentencepiece?pad_with_eot=true")
    assert sticky(["red apple"], context)[0].tolist() == [*plain, 1, 1, 1, 1]
    assert sticky.lengths(sticky(["red apple"], context)).tolist() == [len(plain) + 1]
    bare = make_tokenizer("sentencepiece?eot=false")
    assert bare(["red apple"], context)[0].tolist() == [*plain, 0, 0, 0, 0]
    assert bare.lengths(bare(["red apple", ""], context)).tolist() == [len(plain), 0]


def test_sentencepiece_foreign_model_without_pad_and_without_lower_casing(tmp_path):
    import sentencepiece as spm

    texts = iter(["one red apple", "two green pears", "three blue fish"] * 20)
    prefix = str(tmp_path / "m")
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=prefix, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = make_tokenizer(f"sentencepiece:{tmp_path}/m.model")
    assert tokenizer.pad_id == tokenizer.eot_id == 2
    assert tokenizer.mask_id is None
    assert tokenizer.encode("RED apple") != tokenizer.encode("red apple")
    lower = make_tokenizer(f"sentencepiece:{tmp_path}/m.model?lower=true")
    assert lower.encode("RED apple") == tokenizer.encode("red apple")


def tokenizer_json(pieces):
    """A tokenizer of unigram pieces in the library that writes tokenizer.json."""
    import tokenizers as library

    model = library.Tokenizer(library.models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    model.pre_tokenizer, model.decoder = library.pre_tokenizers.Metaspace(), library.decoders.Metaspace()
    return model


def test_padding_and_truncation_stored_in_a_tokenizer_json_are_left_out(tmp_path):
    model = tokenizer_json(["<pad>", "</s>", "<unk>", "▁", "▁a", "▁photo", "▁cat"])
    model.enable_padding(length=8, pad_id=0, pad_token="<pad>")
    model.enable_truncation(2)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(f"siglip:{tmp_path}/tokenizer.json")
    assert tokenizer.encode("a photo") == [4, 5] and tokenizer.encode("a photo a cat") == [4, 5, 4, 6]
    assert tokenizer(["a", "a photo a cat"], 6).tolist() == [[4, 1, 1, 1, 1, 1], [4, 5, 4, 6, 1, 1]]


@pytest.mark.parametrize("file", ["spm", "json"])
def test_siglip_options_of_exported_tokenizers(tmp_path, file):
    if file == "json":
        tokenizer_json(["<pad>", "</s>", "<unk>", "<s>", "▁A", "▁a", "▁cat", "."]).save(str(tmp_path / "x.json"))
    spec = f"siglip:{tmp_path / 'x.json' if file == 'json' else VOCAB_FOLDER / 'emoji_4k.model'}"
    sticky, padded = make_tokenizer(spec), make_tokenizer(f"{spec}?pad_with_eot=false&sot=true&clean=none")
    ids = padded.encode("A cat.")
    assert padded(["A cat."], len(ids) + 4)[0].tolist() == [3, *ids, 1, 0, 0]
    clean = sticky.encode("A cat.")
    assert sticky(["A cat."], len(clean) + 3)[0].tolist() == [*clean, 1, 1, 1] and len(clean) < len(ids)
    assert "sot" not in sticky.options  # fingerprints of earlier runs hold no such option
    padded.save(tmp_path / "saved")
    assert make_tokenizer(tmp_path / "saved") == padded != sticky


def test_siglip_without_a_piece_that_an_option_needs(tmp_path):
    tokenizer_json(["<x>", "</s>", "<unk>", "▁a"]).save(str(tmp_path / "x.json"))
    with pytest.raises(UserError, match="needs one of the pieces <s>, <bos> as start of text"):
        make_tokenizer(f"siglip:{tmp_path}/x.json?sot=true")
    assert make_tokenizer(f"siglip:{tmp_path}/x.json?pad_with_eot=false")(["a"], 4).tolist() == [[3, 1, 1, 1]]


# --- WordPiece ---


def test_wordpiece(wordpiece_spec):
    tokenizer = make_tokenizer(wordpiece_spec)
    index = BERT_PIECES.index
    assert tokenizer.encode("Unaffable CATS, Café 猫猫 xyz!") == [
        *map(index, ["un", "##aff", "##able", "cat", "##s", ",", "cafe", "猫", "猫", "[UNK]", "!"])
    ]
    np.testing.assert_array_equal(tokenizer(["a cat"], 6), [[2, 5, 6, 3, 0, 0]])
    assert tokenizer.encode("[CLS]") == [*map(index, ["[", "cls", "]"])]
    assert tokenizer.special_ids == {0, 2, 3, 4} and tokenizer.mask_id == 4
    assert tokenizer.decode(tokenizer(["a cats"], 8)[0]) == "a cats"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_separator_is_a_piece(tmp_path, end):
    """As in bert-base-chinese. It must not shift the ids of the pieces after it."""
    pieces = [*BERT_PIECES[:6], "\u2028", *BERT_PIECES[6:]]
    (tmp_path / "vocab.txt").write_bytes((end.join(pieces) + end).encode())
    tokenizer = make_tokenizer(f"wordpiece:{tmp_path}/vocab.txt")
    assert tokenizer.vocab_size == len(pieces) and tokenizer.encode("cat") == [pieces.index("cat")]


def test_wordpiece_lit_and_flip_layouts(wordpiece_spec):
    np.testing.assert_array_equal(make_tokenizer(wordpiece_spec + "?eot=false")(["a cat"], 4), [[2, 5, 6, 0]])
    np.testing.assert_array_equal(make_tokenizer(wordpiece_spec + "?sot=false")(["a cat"], 4), [[5, 6, 3, 0]])


# --- all of them ---


@pytest.fixture(
    params=["sentencepiece", "sentencepiece?sot=true&pad_with_eot=true", "clip_bpe", "clip_bpe?mask=true", "wordpiece"]
)
def any_tokenizer(request, wordpiece_spec):
    return make_tokenizer(wordpiece_spec if request.param == "wordpiece" else request.param)


def test_truncation_keeps_eot_last_and_lengths_count_tokens(any_tokenizer):
    ids = any_tokenizer(["a cat " * 50, "a cat", ""], 12)
    assert ids.shape == (3, 12) and ids.dtype == np.int32
    assert ids[0, -1] == any_tokenizer.eot_id
    has_sot = any_tokenizer.sot_id is not None
    assert any_tokenizer.lengths(ids).tolist() == [12, has_sot + len(any_tokenizer.encode("a cat")) + 1, has_sot + 1]
    np.testing.assert_array_equal(any_tokenizer(["a cat " * 50], 40)[0, :11], ids[0, :11])
    assert ids.min() >= 0 and ids.max() < any_tokenizer.vocab_size


def test_save_and_pickle_round_trip(any_tokenizer, tmp_path):
    texts = ["a cat", "Un-affable café 猫 &amp; 3"]
    any_tokenizer.save(tmp_path / "saved")
    for again in (make_tokenizer(str(tmp_path / "saved")), pickle.loads(pickle.dumps(any_tokenizer))):
        assert again == any_tokenizer and hash(again) == hash(any_tokenizer)
        assert (again.sot_id, again.eot_id, again.pad_id, again.mask_id) == (
            any_tokenizer.sot_id, any_tokenizer.eot_id, any_tokenizer.pad_id, any_tokenizer.mask_id,
        )  # fmt: skip
        np.testing.assert_array_equal(again(texts, 16), any_tokenizer(texts, 16))


def test_encode_returns_a_copy_of_what_it_caches(any_tokenizer):
    first = any_tokenizer.encode("a cat")
    first.append(-1)
    assert any_tokenizer.encode("a cat") == first[:-1]


def test_lone_surrogate_is_not_fatal(any_tokenizer):
    assert any_tokenizer(["a cat \ud83d"], 12).shape == (1, 12)


def test_fingerprint_tells_settings_and_vocabularies_apart(tmp_path, sentencepiece, clip_bpe):
    (tmp_path / "other.model").write_bytes(train(["one red apple", "two green pears"] * 30, 275))
    specs = ["sentencepiece?sot=true", "sentencepiece?pad_with_eot=true", f"sentencepiece:{tmp_path}/other.model"]
    assert len({t.fingerprint() for t in [sentencepiece, clip_bpe, *map(make_tokenizer, specs)]}) == 5
    assert make_tokenizer("sentencepiece").fingerprint() == sentencepiece.fingerprint()


def test_damaged_saved_folder_is_refused(tmp_path, sentencepiece):
    sentencepiece.save(tmp_path)
    metadata = json.loads((tmp_path / METADATA_FILE).read_text())
    (tmp_path / METADATA_FILE).write_text(json.dumps(metadata | {"options": metadata["options"] | {"sot": True}}))
    with pytest.raises(UserError, match="fingerprint differs"):
        make_tokenizer(str(tmp_path))
    (tmp_path / METADATA_FILE).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        make_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sentencpiece", "neither a kind"),
        ("sentencepiece?sot=1", "allowed: true, false"),
        ("sentencepiece?mask=true", "unknown option 'mask'; allowed: sot, eot, pad_with_eot, lower"),
        ("sentencepiece:/no/such.model", "cannot read /no/such.model"),
        (f"sentencepiece:{__file__}", "not a SentencePiece model"),
        (f"clip_bpe:{__file__}", "not CLIP's BPE vocabulary"),
        ("clip_bpe?specials=hf", "allowed: open_clip, openai, none"),
        ("wordpiece", "needs the path of its vocabulary"),
        (f"wordpiece:{__file__}", "not a BERT vocabulary"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(UserError, match="^[^\n]*$") as e:
        make_tokenizer(spec)
    assert message in str(e.value)


def test_context_without_room_is_refused(clip_bpe):
    assert clip_bpe(["a cat"], 3).tolist() == [[49406, 320, 49407]]
    with pytest.raises(UserError, match="context=2"):
        clip_bpe(["a cat"], 2)
    with pytest.raises(TypeError):
        clip_bpe("a cat", 8)


# --- training one ---


class ListSource:
    name = "list"

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        from clip_jax.data.records import BadRecord

        if self.records[i] is None:
            raise BadRecord("corrupt image")
        return self.records[i]


def test_source_texts_reads_weighted_nested_fields():
    records = [{"texts": ["a", "b"], "names": {"ko": "문어", "de": ["x", "y"]}, "label": 3}, None, {"texts": ["c"]}]
    assert list(source_texts(ListSource(records))) == ["a", "b", "c"]
    assert list(source_texts(ListSource(records), "names,texts*2")) == ["문어", "x", "y", "a", "a", "b", "b", "c", "c"]
    with pytest.raises(UserError, match="'tags'"):
        list(source_texts(ListSource(records), "texts,tags"))
    for wrong in ("texts*0", "texts*x", ""):
        with pytest.raises(UserError, match="name\\*weight"):
            list(source_texts(ListSource(records), wrong))


def test_train_is_deterministic_and_layout_is_ours():
    texts = ["one Red apple", "two green pears", "three blue fish", "línea\nnew"] * 20
    model = train(texts, 280)
    assert model == train(texts, 280)
    from clip_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(model, sot=True)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eot_id, tokenizer.sot_id, tokenizer.mask_id) == (
        280,
        0,
        1,
        3,
        4,
    )
    assert tokenizer.decode(tokenizer.encode("Purple 문어")) == "purple 문어"


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "no text"),
        (["  "], 300, "no text"),
        (["a red apple"], 4096, "vocab_size=4096 does not fit the 1 training texts: at most "),
        (["a red apple"], 262, "vocab_size=262 does not fit the 1 training texts: at least "),
    ],
)
def test_train_refuses(texts, vocab_size, message):
    with pytest.raises(UserError, match="^[^\n]*$") as e:
        train(texts, vocab_size)
    assert message in str(e.value)


def test_file_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.json.xz").write_bytes(lzma.compress(json.dumps({"x": ["three", {"y": "four"}], "n": 5}).encode()))
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    assert [*file_texts(f"{tmp_path}/a.txt"), *file_texts(f"{tmp_path}/b.json.xz")] == ["one", "two", "three", "four"]
    for name in ("broken.txt.gz", "absent.txt"):
        with pytest.raises(UserError, match=name):
            list(file_texts(f"{tmp_path}/{name}"))


def test_command_trains_on_a_manifest(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"a quick brown fox\njumps over the lazy dog\n" * 20))
    rows = ["image,caption"] + [
        f"x.png,{text}" for text in ["one red apple", "two green pears", "three blue fish"] * 20
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    main(
        [
            f"--source={tmp_path}/pairs.csv",
            f"--out={tmp_path}/out/my.model",
            "--vocab-size=295",
            "--add-texts",
            f"{tmp_path}/more.txt.gz",
        ]
    )
    assert "295 ids" in capsys.readouterr().out
    assert make_tokenizer(f"sentencepiece:{tmp_path}/out/my.model").vocab_size == 295
    assert main([f"--source={tmp_path}/pairs.csv", f"--out={tmp_path}/out/folder", "--vocab-size=9999"]) == 0
    assert "pieces for 283 ids at most, so the vocabulary is that, not 9999" in capsys.readouterr().out
    assert make_tokenizer(f"{tmp_path}/out/folder").vocab_size == 283
    assert make_tokenizer(f"{tmp_path}/out/my.model") == make_tokenizer(f"sentencepiece:{tmp_path}/out/my.model")
