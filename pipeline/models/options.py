"""The options of the commands that train models and of `index-benchmarks`, as the command line
reads them. Each is listed here alone: the commands and the cards of models take them from these
classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

_SOURCE = "text: .txt, .jsonl[.gz|.zst], .parquet, or rows of a run: RUN:corpus, RUN:rejected"
_Licence = Annotated[
    str,
    Option(
        "--license",
        "--licence",
        help="license of the sources, for the model's card, e.g. CC-BY-SA-4.0",
    ),
]
_TextColumn = Annotated[str, Option(help="column of the text in .jsonl and .parquet")]


@dataclass(frozen=True, kw_only=True)
class LmOptions:
    """How to train a language model.

    `where` selects among the rows of runs. `prune` has counts for orders from 1 on, the last one
    for all higher orders. Tokens are words and punctuation; or pieces of a SentencePiece model,
    which is trained to a vocabulary of `sentencepiece` or given.
    """

    sources: Annotated[list[str], Argument(help=_SOURCE)]
    output: Annotated[
        Path, Option("-o", "--output", help="model to write; its card is put beside it")
    ]
    licence: _Licence
    where: Annotated[str, Option(help="SQL condition on rows of a run", metavar="SQL")] = ""
    order: Annotated[int, Option(help="n-gram order")] = 5
    prune: Annotated[
        str | None,
        Option(
            help="drop n-grams seen at most this often, one count per order",
            show_default="0,0,1, as far as the order goes",
        ),
    ] = None
    memory: Annotated[str, Option(help="memory for lmplz, e.g. 4G")] = "1G"
    bits: Annotated[
        int, Option(help="of quantized probabilities and back-offs; 0: not quantized")
    ] = 8
    sentencepiece: Annotated[
        int | None, Option(help="train SentencePiece to this vocabulary", show_default="words")
    ] = None
    sentencepiece_model: Annotated[Path | None, Option(help="or use this SentencePiece model")] = (
        None
    )
    lmplz_option: Annotated[
        list[str] | None, Option(help="passed to lmplz unchanged; repeat for more")
    ] = None
    held_out: Annotated[float, Option(help="share of documents kept out of training")] = 0.02
    text_column: _TextColumn = "text"


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """How to train a classifier; of two labels the first one is the one to look for.

    The suffix of `output` decides: `.ftz` is product-quantized and cut to its `features` strongest
    features, `.bin` is kept whole. `buckets` hash the word n-grams.
    """

    positive: Annotated[list[str] | None, Option(help=f"the same as --source hq={_SOURCE}")] = None
    negative: Annotated[list[str] | None, Option(help="the same as --source lq=…")] = None
    source: Annotated[
        list[str] | None,
        Option(help="texts of a label, LABEL=…; repeat for more", metavar="LABEL=SOURCE"),
    ] = None
    output: Annotated[
        Path, Option("-o", "--output", help="model to write: .ftz is quantized, .bin whole")
    ]
    licence: _Licence
    where: Annotated[
        list[str] | None,
        Option(
            help="SQL condition on rows of runs among the sources of a label; --positive is hq, "
            "--negative lq",
            metavar="LABEL=SQL",
        ),
    ] = None
    epochs: int = 5
    learning_rate: float = 0.5
    dimensions: int = 16
    word_ngrams: int = 2
    buckets: int = 200_000
    features: int = 50_000
    seed: int = 0
    held_out: Annotated[
        float, Option(help="share of documents that precision and recall are measured on")
    ] = 0.1
    sample: Annotated[
        str, Option(help="texts like those to be filtered, to calibrate the threshold on")
    ] = ""
    sample_where: Annotated[
        str, Option(help="SQL condition on rows of a run that are the sample", metavar="SQL")
    ] = ""
    keep_best: Annotated[str, Option(help="percentages of the sample to find thresholds for")] = (
        "5,10,20,50"
    )
    text_column: _TextColumn = "text"


@dataclass(frozen=True, kw_only=True)
class BpeOptions:
    """How to train a tokenizer, of at most `vocab_size` tokens with all bytes and special tokens.

    About `sample_bytes` of the sources are learned from. `where` selects among the rows of runs.
    """

    sources: Annotated[
        list[str], Argument(help="a run, for its corpus, or text: .txt, .jsonl, .parquet, RUN:KIND")
    ]
    vocab_size: Annotated[int, Option(help="tokens; up to 65,536 take two bytes each")] = 32_768
    output: Annotated[
        Path, Option("-o", "--output", help="tokenizer.json to write, for pack.tokenizer")
    ]
    licence: _Licence
    where: Annotated[str, Option(help="SQL condition on rows of a run", metavar="SQL")] = ""
    sample_bytes: Annotated[
        int,
        Option(help="of text to learn from, drawn by its hash; it costs memory and time", min=1),
    ] = 500_000_000
    end_of_text: Annotated[str, Option(help="token after each document")] = "<|endoftext|>"
    begin_of_text: Annotated[str, Option(help="token before a document; '': none")] = ""
    special: Annotated[
        list[str] | None, Option(help="a further special token, e.g. of dialogues; repeat for more")
    ] = None
    held_out: Annotated[float, Option(help="share of documents that it is measured on")] = 0.01
    text_column: _TextColumn = "text"


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """What to train a model of engine "blocks" on, and how to measure it.

    A row of `gold` has `url` and `main_content`, and optionally `html` (a page that is in no WARC
    file), `page_type`, `license` and `weight`, which is multiplied by its file's.
    """

    pages: Annotated[
        list[Path] | None, Argument(help="WARC files with the pages; none if all rows have html")
    ] = None
    gold: Annotated[
        list[Path],
        Option(help="JSONL of url and main_content, compressed or not; repeat for more"),
    ]
    output: Annotated[
        Path, Option("-o", "--output", help="model to write, .json.gz, for extract.model")
    ]
    licence: _Licence
    weight: Annotated[
        list[str] | None,
        Option(help="how much a page of a gold file counts, against 1", metavar="GOLD=NUMBER"),
    ] = None
    cross_validate: Annotated[
        bool, Option(help="measure on hosts that a model has not seen; takes five trainings")
    ] = True
    learning_curve: Annotated[
        bool, Option(help="cross-validate with 1/8, 1/4 and 1/2 of the pages, too")
    ] = False


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What to index of which evaluation sets."""

    files: Annotated[
        list[str],
        Argument(help="evaluation sets: .jsonl, .json, .csv, .parquet, folders, .tar[.zst]"),
    ]
    output: Annotated[
        Path, Option("-o", "--output", help="index to write, for decontamination.index")
    ]
    background: Annotated[
        list[str] | None,
        Option(help="clean text whose n-grams do not count as a match; repeat for more"),
    ] = None
    n: Annotated[int, Option(help="words of an n-gram")] = 13
    # texts of 8 words are titles and phrases of law ("the Equal Protection Clause of the Fourteenth
    # Amendment", an answer in MMLU), of 9 still "when the Moon passes between Earth and the Sun";
    # no text of 10 or 11 words stood in 56 MB of clean text
    min_words: Annotated[int, Option(help="shorter texts are no passages by themselves")] = 10
    # a reading passage is repeated for each of its questions, up to 8 in LSAT; templates are in
    # hundreds of items
    max_items: Annotated[
        int, Option(help="n-grams in more items of a set than this are its template")
    ] = 20
