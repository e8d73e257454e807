"""Settings of the dedup stage, and what all of its phases share."""

from typing import Literal

from pydantic import Field, model_validator

from filters import validated
from stages.dedup.minhash import Signature
from stages.dedup.shuffle import Layout

VERSION = 3


CELLS = 4096  # of a lane: the most partitions that a band can be cut into


# Ids of documents of earlier batches carry this bit, so that they sort behind all others, and the
# number of their index.
EARLIER = 1 << 63


@validated
class DedupConfig:
    """Settings of the dedup stage.

    `keep_rule` names the copy that stays: the longest, the newest by crawl date, the first by
    doc_id, or 'best:<column>', the one with the highest score; ties go to the smaller content hash,
    then the smaller doc_id.

    `against`: runs, or outputs of `gristmill dedup`, whose published documents count as copies that
    stay. They must have been made with `write_index`: the keys of their kept documents, or of all.
    `verify_share`: share of the dropped documents, in [0, 1], whose true Jaccard similarity with
    the kept copy is measured and stored in the keep table. A host, language or input of at least
    `alarm_documents` that loses more than `alarm_share` is pointed out.

    `line_level`: remove lines, or paragraphs, that an earlier document of the batch holds already
    (CCNet, Dolma).

    Sizes: `documents_per_unit` are sorted into one file (about 450 bytes of memory each); a unit
    works on `partition_bytes` of rows at once (about four times that in memory, and 0.2 GB); a
    graph that needs more than `cluster_memory` bytes is clustered in rounds on all workers instead
    of in one process.
    """

    enabled: bool = True
    num_bands: int = Field(default=14, gt=0, le=256)
    rows_per_band: int = Field(default=8, gt=0, le=64)
    ngram: int = Field(default=5, gt=0)
    scheme: Literal["affine32", "affine64"] = "affine32"
    seed: int = 1
    keep_rule: str = Field(default="longest", pattern=r"^(longest|newest|first|best:.+)$")
    against: tuple[str, ...] = Field(default=(), max_length=127)
    write_index: Literal["off", "kept", "all"] = "off"
    verify_share: float = Field(default=0.0, ge=0, le=1)
    alarm_share: float = Field(default=0.9, ge=0, le=1)
    alarm_documents: int = Field(default=20, gt=0)
    line_level: Literal["off", "line", "paragraph"] = "off"
    documents_per_unit: int = Field(default=2_000_000, gt=0)
    partition_bytes: int = Field(default=256_000_000, ge=100_000)
    cluster_memory: int = Field(default=8_400_000_000, gt=0)
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)

    @property
    def signature(self) -> Signature:
        """What the extract stage needs to know to make the band keys."""
        return Signature(self.num_bands, self.rows_per_band, self.ngram, self.scheme, self.seed)

    @property
    def layout(self) -> Layout:
        """The grid of the sorted keys: a lane for content hashes and one for each band."""
        return Layout(width=2, lanes=1 + self.num_bands, cells=CELLS)

    @model_validator(mode="after")
    def _index_needs_keys(self) -> "DedupConfig":
        if not self.enabled and (
            self.write_index != "off" or self.against or self.line_level != "off"
        ):
            raise ValueError(
                "enabled = false leaves nothing to do for write_index, against and line_level"
            )
        return self
