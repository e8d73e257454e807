"""Decontamination: coverage equals that of a slow matcher on tuples of words; trimming removes the
items and keeps the rest; bad indexes are refused.
"""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from filters import first_failure
from filters.decontamination import Decontamination
from filters.passage_index import MAGIC, find_matches, load_index
from filters.text import ngrams
from filters.text.view import TextView
from pipeline.models.benchmark_index import IndexOptions, build_index
from tests.support.texts import PROSE, TEXTS
from tests.support.words_reference import ALONE, slow_normalize

ITEM = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg."
)
OTHER = "The astronomer's planet rotates faster after a meteorite impact; which is the most likely effect of this increase?"
SHORT = "A sentence of ten words, which is just long enough here."

N, MIN_WORDS, MAX_ITEMS = 4, 2, 2
WORDS = st.sampled_from(["a", "b", "c", "q", "don't", "é", "7", "42", "internationalization", "東"])
PASSAGES = st.lists(WORDS, max_size=9).map(" ".join)
# a set is a list of items, an item a list of texts
SETS = st.lists(
    st.lists(st.lists(PASSAGES, max_size=4), min_size=1, max_size=5), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("index")
    write(folder / "gsm8k.jsonl", [{"question": ITEM, "answer": "18"}, {"question": SHORT}])
    write(folder / "arc.jsonl", [{"query": {"text": OTHER, "choices": ["yes", "no"]}}])
    return built(folder, folder.parent / "sets.index")


def write(path: Path, rows: list) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def built(folder: Path, output: Path, **options) -> str:
    build_index(IndexOptions(files=[str(folder)], output=output, **options))
    load_index.cache_clear()
    return str(output)


def measured(text: str, index: str, **options) -> dict:
    return Decontamination(index=index, **options).measure(TextView(text))


# --- coverage -------------------------------------------------------------------------------------


def slow_size(text):
    return sum(
        0.5 if re.match(f"{ALONE}|[\u1000-\u109f\u1780-\u17ff]", word) else 1
        for word in text.split()
    )


def slow_passages(item):
    texts = list(dict.fromkeys(filter(None, map(slow_normalize, item))))
    long = [text for text in texts if slow_size(text) >= MIN_WORDS]
    return long or slow_arranged(texts)


def slow_arranged(texts):
    passages = []
    texts = [text for text in texts if text not in list("abcdefghij")]
    bare = [re.sub("^(question|q) | (answer|a)$", "", text) for text in texts]
    for strings in (texts, bare):
        for question, answers in (
            ((strings[0], strings[1:]), (strings[-1], strings[:-1])) if len(strings) > 1 else ()
        ):
            for choices in (answers, *([answer] for answer in answers)):
                if slow_size(" ".join([question, *choices])) >= MIN_WORDS:
                    lettered = [f"{'abcdefgh'[k]} {answer}" for k, answer in enumerate(choices)]
                    passages += [" ".join([question, *choices]), " ".join([question, *lettered])]
        passages += [
            f"{text} {strings[-1]}"
            for text in strings[:-1]
            if slow_size(f"{text} {strings[-1]}") >= MIN_WORDS
        ]
    return passages


def slow_grams(passage):
    words = passage.split()
    n = min(N, len(words))
    grams = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return {gram for gram in grams if not all(word.isdecimal() for word in gram)}


def slow_coverage(text, sets):
    common = set()
    for items in sets:
        counts = Counter(
            gram
            for item in items
            for gram in {g for p in slow_passages(item) for g in slow_grams(p)}
        )
        common |= {gram for gram, count in counts.items() if count > MAX_ITEMS}
    words = slow_normalize(text).split()
    grams_in_text = {
        tuple(words[i : i + n]) for n in range(MIN_WORDS, N + 1) for i in range(len(words) - n + 1)
    }
    passages = [
        slow_grams(passage) - common
        for items in sets
        for item in items
        for passage in slow_passages(item)
    ]
    return max(
        (len(grams & grams_in_text) / len(grams) for grams in passages if grams), default=None
    )


@given(sets=SETS, data=st.data())
@example(sets=[[["a b c"], ["a b 7 42 7"]], [["7 42 7 42 7"]]], data=None)
@example(sets=[[["a b c"]], [["b", "42", "東", "a"]]], data=None)
def test_coverage_equals_that_of_the_slow_matcher(tmp_path_factory, sets, data):
    texts = [text for items in sets for item in items for text in item]
    if data is None:
        text = "a b c 7 42 7 42 7 a b 7 42"
    else:
        parts = st.lists(st.sampled_from([*texts, "a b", "7 42"]) | PASSAGES, max_size=4)
        text = data.draw(st.sampled_from([" ", ", ", "\n", "\t– "])).join(data.draw(parts))
    expected = slow_coverage(text, sets)
    folder = tmp_path_factory.mktemp("sets")
    for number, items in enumerate(sets):
        write(folder / f"set{number}.jsonl", items)
    options = {"n": N, "min_words": MIN_WORDS, "max_items": MAX_ITEMS}
    if expected is None:
        with pytest.raises(ValueError, match="nothing to index"):
            built(folder, folder / "index", **options)
    else:
        scores = measured(text.upper(), built(folder, folder / "index", **options))
        assert scores["coverage"] == pytest.approx(expected)
        assert (scores["evidence"] is None) == (expected == 0)
        # traces drop nothing
        assert (scores["benchmark"] is None) == (expected <= Decontamination().coverage[1])


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: text.replace(" ", " \n\u00a0"),
        lambda text: re.sub(r"[.,;$?]", "", text).replace("’", "'"),
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: f"Before it.{text}And after it.",
    ],
)
def test_case_spaces_and_punctuation_do_not_hide_an_item(index, change):
    assert measured(change(ITEM), index)["coverage"] == 1.0


def test_a_problem_with_other_numbers_is_another_problem(index):
    """Two numbers changed: only in the middle are there 13 words in a row without one of them."""
    assert measured(ITEM.replace("16", "20").replace("$2", "$5"), index)["coverage"] < 0.7


def test_an_idiom_that_an_item_quotes_is_a_small_part_of_it(index):
    scores = measured(
        "She eats three for breakfast every morning and bakes muffins for her friends, they say.",
        index,
    )
    assert scores["coverage"] == pytest.approx(1 / 27)
    assert first_failure("decontamination", Decontamination(index=index), scores) is None


def test_the_note_names_the_best_match_s_set_row_and_place(index):
    scores = measured(
        f"{SHORT} She eats three for breakfast every morning and bakes muffins for her friends every day.",
        index,
    )
    assert scores["benchmark"] == "gsm8k"
    # it does not quote the page, which may contain personal data
    assert scores["evidence"] == f"gsm8k.jsonl:2, 1.00 of 1 n-grams, at 0 to {len(SHORT) - 1}"
    failure = first_failure("decontamination", Decontamination(index=index), scores)
    assert failure is not None and failure.rule == "decontamination.coverage"


@given(TEXTS)
def test_measure_is_total(index, text):
    for action in ("drop", "trim"):
        scores = measured(text, index, action=action)
        assert list(scores) == ["coverage", "cut_share", *Decontamination.notes]
        assert list(scores.values()) == [0.0, 0.0, None, None]


# --- words ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=20), st.integers(1, 5))
def test_an_ngram_hash_extends_the_hash_of_its_first_words(hashes, k):
    words = np.array(hashes, np.uint64)
    first = ngrams.ngram_hashes(words, k)[: len(words) - 5]
    longer = ngrams.extended(first.copy(), (words[i : i + len(words) - 5] for i in range(k, 6)))
    assert longer.tolist() == ngrams.ngram_hashes(words, 6).tolist()


ARABIC = "بِسْمِ اللَّهِ الرَّحْمٰنِ الرَّحِيمِ الحمد لله"
HINDI = "आज प्रधान मंत्री नरेंद्र मोदी ने कहा"


@pytest.mark.parametrize(
    "item, page",
    [
        (
            ["会议由哪个机构主持召开？", "全国人民代表大会常务委员会"],
            "会议由全国人民代表大会常务委员会主持召开。",
        ),
        (["会议由全国人民代表大会常务委员会主持召开。"], "全国人民代表大会常务委员会"),
        ([HINDI], HINDI),
        ([ARABIC], ARABIC),
        (["လူတိုင်းသည် တူညီလွတ်လပ်"], "လူတိုင်းသည် တူညီလွတ်လပ်"),
    ],
)
def test_a_phrase_or_a_name_is_no_item_in_any_script(tmp_path, item, page):
    (tmp_path / "sets").mkdir()
    write(tmp_path / "sets" / "x.jsonl", [item, [ITEM]])
    assert measured(page, built(tmp_path / "sets", tmp_path / "index"))["coverage"] <= 0.2


@pytest.mark.parametrize(
    "item, page",
    [
        (
            "太阳从东边升起，到西边落下，那么中午的时候影子朝向哪一个方向？",
            "问：太阳从东边升起，到西边落下，那么中午的时候影子朝向哪一个方向？",
        ),
        (f"{HINDI} कि देश के किसान बहुत मेहनत करते हैं", f"{HINDI} कि देश के किसान बहुत मेहनत करते हैं।"),
        (
            f"{ARABIC} رب العالمين الرحمن الرحيم مالك",
            "بسم الله الرحمن الرحيم الحمد لله رب العالمين الرحمن الرحيم مالك",
        ),
    ],
)
def test_an_item_is_found_in_any_script(tmp_path, item, page):
    (tmp_path / "sets").mkdir()
    write(tmp_path / "sets" / "x.jsonl", [[item]])
    assert measured(page, built(tmp_path / "sets", tmp_path / "index"))["coverage"] == 1.0


# --- trimming -------------------------------------------------------------------------------------


def test_drop_does_not_change_the_document(index):
    view = TextView(f"{PROSE}\n{ITEM}")
    assert Decontamination(index=index).edit(view)[0] is view


def test_trim_removes_the_item_and_keeps_the_rest(index):
    before, after = PROSE.split("\n\n")
    view = TextView(f"{before}\nQ: {ITEM}\n\n{after}", "en")
    edited, scores = Decontamination(index=index, action="trim").edit(view)
    assert edited.text == f"{before}\n\n{after}" and edited.language == "en"
    assert scores["coverage"] == 0.0
    assert scores["cut_share"] == pytest.approx(1 - len(edited.text) / len(view.text))
    assert scores["benchmark"] == "gsm8k" and scores["evidence"].startswith(
        "gsm8k.jsonl:1, 1.00 of 27 n-grams, at "
    )


def test_trim_removes_whole_sentences_and_no_more(index):
    part = OTHER[: OTHER.index("; which")]
    view = TextView(f"Here it starts. (See no.{OTHER} Here it goes on.")
    assert (
        Decontamination(index=index, action="trim").edit(view)[0].text
        == "Here it starts.\n\nHere it goes on."
    )
    # half of the item has too few n-grams to be cut
    assert Decontamination(index=index, action="trim").edit(TextView(part))[0].text == part


def test_trim_looks_for_a_sentence_end_within_200_characters(index):
    far = "word " * 60
    edited, _ = Decontamination(index=index, action="trim").edit(
        TextView(f"{far}so-called({OTHER[:-1]}) {far}.")
    )
    assert edited.text == f"{far.strip()}\n\n{far}."


def test_trim_removes_what_is_between_two_matches(index):
    changed = ITEM.replace("muffins", "scones").replace(" She sells", " Think of that! She sells")
    edited, scores = Decontamination(index=index, action="trim").edit(
        TextView(f"{PROSE}\n{changed}")
    )
    assert edited.text == PROSE
    assert scores["evidence"].startswith("gsm8k.jsonl:1, 0.26 of 27")


def test_trim_removes_an_item_that_the_first_cut_joined(index):
    head, tail = SHORT[:30], SHORT[30:]
    edited, scores = Decontamination(index=index, action="trim").edit(
        TextView(f"{PROSE}\n{head}\n{OTHER}\n{tail}")
    )
    assert edited.text == PROSE and scores["coverage"] == 0.0


def test_trim_removes_only_what_exceeds_the_bound(index):
    view = TextView(
        "She eats three for breakfast every morning and bakes muffins for her friends, they say."
    )
    assert Decontamination(index=index, action="trim", coverage=(0, 1 / 27)).edit(view)[0] is view
    assert (
        Decontamination(index=index, action="trim", coverage=(0, 1 / 28)).edit(view)[0].text == ""
    )


def test_a_document_that_is_mostly_test_items_is_dropped(index):
    filter = Decontamination(index=index, action="trim")
    edited, scores = filter.edit(TextView(f"{ITEM}\n{OTHER}\nThe end."))
    assert edited.text == "The end."
    failure = first_failure("decontamination", filter, scores)
    assert failure is not None and failure.rule == "decontamination.cut_share"


PIECES = st.lists(
    st.sampled_from(
        [ITEM, OTHER, SHORT, *ITEM.split(". "), "It is. ", "\n", "\n\n", "3.5 ", "東京。", "yes "]
    )
    | st.text(max_size=9),
    max_size=8,
).map("".join)


@given(PIECES)
def test_after_trimming_nothing_is_left_to_trim(index, text):
    filter = Decontamination(index=index, action="trim", cut_share=None)
    edited, scores = filter.edit(TextView(text))
    assert scores["coverage"] <= filter.coverage[1] and 0 <= scores["cut_share"] <= 1
    assert (scores["cut_share"] > 0) == (measured(text, index)["coverage"] > filter.coverage[1])
    again, second = filter.edit(edited)
    assert again is edited and second["cut_share"] == 0
    # the remaining parts were in the text, in this order
    place = 0
    for line in edited.text.split("\n\n"):
        place = text.index(line, place) + len(line)


# --- the index ------------------------------------------------------------------------------------


def refusal(path: str) -> str:
    load_index.cache_clear()
    with pytest.raises(ValueError) as refused:
        Decontamination(index=path).check(())
    return str(refused.value)


def test_a_missing_index_is_refused(tmp_path):
    assert re.search("names no file; build one with `gristmill index-benchmarks", refusal(""))
    assert re.search(r"nowhere: no such file; build one", refusal(str(tmp_path / "nowhere")))


@pytest.mark.parametrize("raw", [b"", b"PAR1", MAGIC[:-1]])
def test_a_file_of_another_format_is_refused(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    assert "x: not an index of evaluation sets" in refusal(str(tmp_path / "x"))


def test_a_damaged_index_is_refused(index, tmp_path):
    raw = Path(index).read_bytes()
    for cut in (len(MAGIC), len(MAGIC) + 8, len(MAGIC) + 20, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut").write_bytes(raw[:cut])
        assert f"cut short or damaged, the checksum of its {cut:,} bytes" in refusal(
            str(tmp_path / "cut")
        )
    for place in (len(MAGIC), len(MAGIC) + 9, len(raw) // 2, len(raw) - 1):
        (tmp_path / "bad").write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert "cut short or damaged" in refusal(str(tmp_path / "bad"))


def test_an_index_of_another_normalizer_is_refused(index, tmp_path):
    rest = Path(index).read_bytes()[len(MAGIC) + 8 :].replace(b"nfkd-words-1", b"nfkd-words-9")
    (tmp_path / "other").write_bytes(MAGIC + xxhash.xxh3_64_digest(rest) + rest)
    assert re.search(
        r"words-9.*this filter reads version 1 and normalizer 'nfkd-words-1'.*again",
        refusal(str(tmp_path / "other")),
    )


def test_trimming_above_no_bound_is_refused(index):
    with pytest.raises(ValueError, match="coverage is off, so action = 'trim' has no share"):
        Decontamination(index=index, action="trim", coverage=None).check(())
    Decontamination(index=index, coverage=None).check(())


def test_all_bits_of_a_fingerprint_count(index):
    whole = load_index(index)
    assert len(find_matches(ITEM, whole).entries) == 27
    assert not len(find_matches(ITEM, whole._replace(low=whole.low ^ np.uint16(1))).entries)


def test_matches_are_the_same_for_a_text_of_any_length(index):
    """Long texts have words that pass the bitmap by chance: none of them may count."""
    rng = np.random.default_rng(1)
    text = " ".join(f"w{k}" for k in rng.integers(0, 1000, 200_000))
    assert not len(find_matches(text, load_index(index)).entries)
    assert measured(f"{text} {OTHER} {text}", index)["coverage"] == 1.0
