"""Settings of the extract stage."""

from typing import Literal

from pydantic import Field, model_validator

from filters import Bound, File, validated


@validated
class TrafilaturaOptions:
    """Arguments of trafilatura.extract (Barbaresi 2021, ACL demo 15), with its own defaults.

    FineWeb sets favor_precision; on the 500 pages of WCXB's development sample that costs word-F1
    (see the README).
    """

    favor_precision: bool = False
    favor_recall: bool = False
    fast: bool = False
    include_comments: bool = True
    include_tables: bool = True
    include_links: bool = False
    include_formatting: bool = False
    deduplicate: bool = False


@validated
class ResiliparseOptions:
    """Arguments of resiliparse's extract_plain_text (Bevendorff et al. 2018, ECIR)."""

    main_content: bool = True
    alt_texts: bool = False
    links: bool = False
    form_fields: bool = False
    noscript: bool = False
    comments: bool = True
    list_bullets: bool = True


@validated
class Gate:
    """Drop pages before the expensive extraction that would be dropped after it.

    The page passes if the probability that it is in an allowed language reaches
    `language_probability`, and if its blocks have at least `min_words` words as dedup counts them
    (a character of Chinese is one), boilerplate included, so the main text has fewer. The language
    is that of the page's first 2,000 characters of prose, that is of blocks of 40 and more
    characters with less than half of them in links, and of all blocks if these have under 500: the
    first 1,000 characters of a page are often its menu, and lost four times as many English pages.
    The README says how many pages this drops that would have been kept.
    """

    enabled: bool = True
    language_probability: float = Field(default=0.15, ge=0, le=1)
    min_words: int = Field(default=50, ge=0)


@validated
class ExtractConfig:
    """Settings of the extract stage.

    `filters` are measured and checked in this order. Sizes in bytes, times in seconds of CPU.
    `keep_rejected_text` is the share of rejected documents, in [0, 1], whose text is kept as a
    sample (1 keeps all, so that any bound can be loosened without extracting again). Without
    `keep_text` no text is kept, and dedup is the last stage that can follow. `parallelism` caps the
    tasks at work at once; 0 leaves it to the cluster's size.

    For engine "blocks" alone: `model`, a file of `gristmill train-extractor`, "" for the bundled
    one; `format` of the text; with `rules_see_code` = false the filters and the language are
    measured on the text without its <pre> blocks, which are kept; `confidence` bounds the F1 that
    the engine expects of its text, in [0, 1]. Other engines have no confidence, and nothing is
    rejected by it. Markdown is measured without its marks.
    """

    engine: Literal["blocks", "trafilatura", "resiliparse"] = "blocks"
    model: File = ""
    format: Literal["text", "markdown"] = "text"
    rules_see_code: bool = True
    confidence: Bound = (0.2, 1.0)
    filters: tuple[str, ...] = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    timeout_seconds: float = Field(default=10.0, gt=0)
    max_html_bytes: int = Field(default=10_000_000, gt=0)
    max_text_chars: int = Field(default=2_000_000, gt=0)
    child_memory_bytes: int = Field(default=2_000_000_000, ge=500_000_000)
    recycle_after: int = Field(default=5_000, gt=0)
    keep_rejected_text: float = Field(default=0.01, ge=0, le=1)
    keep_text: bool = True
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)
    batch_size: int = Field(default=512, gt=0)
    gate: Gate = Gate()
    trafilatura: TrafilaturaOptions = TrafilaturaOptions()
    resiliparse: ResiliparseOptions = ResiliparseOptions()

    @model_validator(mode="after")
    def _only_blocks_write_markdown(self) -> "ExtractConfig":
        if self.format != "text" and self.engine != "blocks":
            raise ValueError(
                f"format = '{self.format}' needs engine = 'blocks'; {self.engine} writes plain text"
            )
        return self
