"""Refine: a document over its limits is a rejected row with a reason, and the others are refined."""

import json

import pyarrow.parquet as pq

from pipeline.inspect.why import why
from pipeline.run.execute import Run
from tests.support.inline import make_config, run_inline

OPTIONS = (
    *("input.format=jsonl", "input.url_column=url", "extract.filters=[]", "language.allowed=[]"),
    *('refine.filters=["gopher_quality"]', "refine.scrub_pii=false", "dedup.enabled=false"),
    "pack.seq_len=64",
)
SHORT = (
    "The old mill that stands with the river grinds wheat for the village, as it did when {0} was built. "
    * 4
)


def test_a_document_over_the_time_limit_is_rejected_with_its_reason(tmp_path):
    long = " ".join(f"word{n} and {n * 7919 % 100_003}" for n in range(90_000))
    texts = [SHORT.format(1), long, SHORT.format(2)]
    rows = [{"text": text, "url": f"https://a.example/{n}"} for n, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(tmp_path, [tmp_path / "in.jsonl"], *OPTIONS, "refine.timeout_seconds=0.05")
    run_inline(config)
    store = Run(config).store("refine")
    [commit] = store.commits()
    assert commit.counts == {"kept": 2, "refine.timeout": 1}
    assert commit.cpu_seconds >= 0.05
    [rejected] = pq.read_table(store.uri("rejected", "000000.parquet")).to_pylist()
    assert (rejected["url"], rejected["rejected_by"]) == ("https://a.example/1", "refine.timeout")
    assert (rejected["rejected_value"], rejected["rejected_high"]) == (0.05, 0.05)
    [fate] = why(config.run.directory, "https://a.example/1")
    assert (fate["stage"], fate["rule"]) == ("refine", "refine.timeout")
