"""The contract of both tokenizers: end token, padding, refusal or cut, and errors a user can act
on.
"""

import io
import sys

import numpy as np
import pytest

from salt_jax.io.tokenizer import byte_tokenize, clean_text, load_tokenizer


def test_bytes_are_shifted_by_three_and_ended():
    ids = byte_tokenize("Hé", 6)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [ord("H") + 3, 0xC3 + 3, 0xA9 + 3, 1, 0, 0])


def test_the_null_caption_is_just_the_end_token():
    np.testing.assert_array_equal(byte_tokenize("", 3), [1, 0, 0])


def test_every_byte_has_an_id_of_the_tiny_vocabulary():
    text = "".join(map(chr, range(0x250))) + "\U0010ffff"
    ids = byte_tokenize(text, 2000)
    assert bytes(int(i) - 3 for i in ids if i > 2).decode() == text
    assert ids.max() < 259


def test_a_text_that_just_fits_passes_and_one_byte_more_is_refused():
    assert byte_tokenize("abc", 4)[-1] == 1
    with pytest.raises(ValueError, match=r"'abcd' needs 5 tokens .* length is 4"):
        byte_tokenize("abcd", 4)


def test_cleaning_resolves_entities_twice_and_collapses_white_space():
    assert clean_text("  a &amp;lt; b\n\t c\u00a0d ", lambda text: text) == "a < b c d"


NASTY = (
    "",
    " \t\r\n\u3000\u00a0 ",
    "a cat\u2028walks\u0085on\x0bgrass\x1c.",
    # UTF-8 read as Latin-1
    "caf\u00c3\u00a9 na\u00c3\u00afve \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
    "&amp;lt;b&amp;gt; &amp;amp;amp; &nbsp; &#x1F408; &notanentity; &lt",
    # the last one is half a pair
    "\u201ccurly\u201d \u2018quotes\u2019 \ufb01sh \uff21\uff22 e\u0301 \ud83d",
    "\x1b[31mred\x1b[0m \ufeffmark \x00nul \u200bno width \u00ad soft",
    "\u4e00\u53ea\u732b\uff0c\u8d70\u8def\uff01  \U0001f468\u200d\U0001f469\u200d\U0001f467",
)


@pytest.mark.parity
@pytest.mark.parametrize("text", NASTY)
def test_cleaning_equals_diffusers(text):
    pipeline = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    ftfy = pytest.importorskip("ftfy")
    assert clean_text(text, ftfy.fix_text) == pipeline.prompt_clean(text)


def write_json_vocabulary(path, tokens=("<pad>", "</s>", "<s>", "<unk>")):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["\u2581a", "\u2581cat", "\u2581walks", "\u2581<"]
    model = tokenizers.models.WordLevel(
        {w: i for i, w in enumerate([*tokens, *words])}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    # settings of the file that must not act twice
    ended = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.post_processor = ended
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    return path


def write_sentencepiece_vocabulary(path, pad_id=0):
    sentencepiece = pytest.importorskip("sentencepiece")
    with io.BytesIO() as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a cat walks", "a cat <"] * 20), model_writer=model,
            vocab_size=20, pad_id=pad_id, eos_id=1, bos_id=2, unk_id=3,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        path.write_bytes(model.getvalue())
    return path


def test_json_file_cleans_ends_pads_and_cuts(tmp_path):
    pytest.importorskip("ftfy")
    tokenize = load_tokenizer(write_json_vocabulary(tmp_path / "tokenizer.json"))
    assert tokenize("a", 3).dtype == np.int32
    np.testing.assert_array_equal(tokenize(" a  cat\nwalks &amp;lt;", 7), [4, 5, 6, 7, 1, 0, 0])
    np.testing.assert_array_equal(tokenize("a cat walks <", 3), [4, 5, 1])
    np.testing.assert_array_equal(tokenize("", 3), [1, 0, 0])


def test_sentencepiece_file_has_the_same_contract(tmp_path):
    pytest.importorskip("ftfy")
    path = write_sentencepiece_vocabulary(tmp_path / "spiece.model")
    pieces = sys.modules["sentencepiece"].SentencePieceProcessor(model_file=str(path))
    tokenize = load_tokenizer(path)
    whole = tokenize(" a  cat\nwalks", 20)
    assert whole.dtype == np.int32
    end = int(np.argmax(whole == 1))
    assert pieces.decode(whole[:end].tolist()) == "a cat walks"
    assert (whole[end + 1 :] == 0).all()
    np.testing.assert_array_equal(tokenize("a cat walks", end), [*whole[: end - 1], 1])
    np.testing.assert_array_equal(tokenize("", 3), [1, 0, 0])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file at .*spiece\.model: give"):
        load_tokenizer(tmp_path / "spiece.model")


def test_a_file_of_another_kind_or_vocabulary_is_refused(tmp_path):
    pytest.importorskip("ftfy")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"vocab\.txt is no tokenizer file"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"not umT5's: its <pad> and </s> have ids \(1, 0\)"):
        load_tokenizer(
            write_json_vocabulary(tmp_path / "tokenizer.json", ("</s>", "<pad>", "<s>", "<unk>"))
        )
    with pytest.raises(ValueError, match=r"not umT5's: its <pad> and </s> have ids \(-1, 1\)"):
        load_tokenizer(write_sentencepiece_vocabulary(tmp_path / "spiece.model", pad_id=-1))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "ftfy", None)  # makes its import fail
    with pytest.raises(ImportError, match="needs the library ftfy: pip install ftfy"):
        load_tokenizer(tmp_path / "spiece.model")
