"""[schedule]: how the controller sizes batches."""

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as section

from filters import STRICT

FINITE = STRICT | {"allow_inf_nan": False}


@section(frozen=True, config=FINITE)
class Policy:
    """How the supply is kept ahead of the trainers.

    `horizon_hours`: supply left when a batch lands; always enough until the next one lands.
    `static_inputs`: inputs per batch until the first trainer reports, or while the yield of an
    input is unknown; without any trainer batches end when those of a horizon are unread. `slew`:
    largest factor between one plan and the next. `dead_band`: share of the horizon by which the
    supply may be off before the plan changes. Neither holds back what a trainer would be short of.
    `patience_seconds`: silence after which a trainer counts as stale. `yield_window`: latest
    batches that yield, duration and period are measured on. `starved_hours`: supply below which a
    trainer is short, and which is to be left when a batch lands. `stall_share`: share of time spent
    waiting for data, in [0, 1], above which a trainer stalls.
    """

    horizon_hours: float = Field(default=24.0, gt=0, le=8760)
    min_inputs: int = Field(default=1, ge=1)
    max_inputs: int = Field(default=1000, ge=1)
    static_inputs: int = Field(default=100, ge=1)
    slew: float = Field(default=2.0, ge=1)
    dead_band: float = Field(default=0.15, ge=0, lt=1)
    patience_seconds: float = Field(default=300.0, gt=0)
    yield_window: int = Field(default=5, ge=1)
    starved_hours: float = Field(default=1.0, gt=0)
    stall_share: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _check_range(self) -> "Policy":
        if self.min_inputs > self.max_inputs:
            raise ValueError(
                f"min_inputs = {self.min_inputs} exceeds max_inputs = {self.max_inputs}"
            )
        return self
