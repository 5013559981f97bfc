"""The results of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from selection.ranking import Selection


@dataclass
class Result:
    """The measurements and outcomes of a run. Values that are not known yet are None.

    run.report.Progress creates it, train.select adds the cost of the selections, and
    train.fine_tune the rest while it trains, so an interrupted run can be reported too.

    Attributes:
        status: str. `"interrupted"` until the run ends, then `"done"`, `"diverged"`
            or `"failed"`.
        advice: str. For a diverged run, what happened and what to try.
        accuracy: float. Test accuracy in percent, by the protocol.
        val_accuracy: float. Validation accuracy in percent at the best epoch.
        epochs: list of dict. One row per finished epoch, as in metrics.csv.
        best_epoch: int. Counted from 1.
        compile_s: float. Seconds of first steps beyond a median step.
        eval_s: float. Seconds of evaluation, after every epoch and on the test split.
        checkpoint_s: float. Seconds spent writing checkpoints. No other figure
            contains them.
        peak_bytes: int. The allocator's peak over a training step.
        device: str. The device on which `peak_bytes` was measured.
        estimated_bytes: int. The same peak, estimated before the first step.
        budget_next_layer: str. Under `--memory_budget_mb`, the first layer of the
            ranking that did not fit.
        budget_next_bytes: int. The estimated peak with that layer.
        selection_s: float. Seconds of all selections.
        selection_peak_bytes: int. The allocator's peak over all selections.
        reselections: list of (int, Selection). The epoch, counted from 1, from which
            each later selection holds.
        facts: dict. What the scheme adds to summary.json.
        cached_in: str. `"memory"` or `"disk"` if training reads cached features, else `"off"`.
        cache_s: float. Seconds spent computing or opening cached features.
        cache_bytes: int. Size of the cached features.
        cache_cut: str. The layers whose outputs are cached.
        cache_step_share: float. Operations of a cached step over those of an uncached step.
        cache_full_step_share: float. The same over those of a step that trains every weight.
    """

    status: str = "interrupted"
    advice: str | None = None
    accuracy: float | None = None
    val_accuracy: float | None = None
    epochs: list = field(default_factory=list)
    best_epoch: int | None = None
    compile_s: float = 0.0
    eval_s: float = 0.0
    checkpoint_s: float = 0.0
    peak_bytes: int | None = None
    device: str | None = None
    estimated_bytes: int | None = None
    budget_next_layer: str | None = None
    budget_next_bytes: int | None = None
    selection_s: float | None = None
    selection_peak_bytes: int | None = None
    reselections: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    cached_in: str = "off"
    cache_s: float | None = None
    cache_bytes: int | None = None
    cache_cut: str | None = None
    cache_step_share: float | None = None
    cache_full_step_share: float | None = None

    def latest_selection(self, first: Selection | None) -> Selection | None:
        """Returns the selection that holds now: the last re-selection, or else `first`."""
        return self.reselections[-1][1] if self.reselections else first

    def to_record(self) -> dict:
        """Returns the result as a JSON-ready dict, for a checkpoint."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**record, "reselections": [(epoch, chosen.to_record()) for epoch, chosen in self.reselections]}

    @classmethod
    def from_record(cls, record: dict) -> Result:
        """Returns the result from a record made by `to_record`."""
        later = [(epoch, Selection.from_record(chosen)) for epoch, chosen in record["reselections"]]
        return cls(**{**record, "reselections": later})


def largest_known(*values: int | None) -> int | None:
    """Returns the largest of the values that are not None, or None."""
    return max((value for value in values if value is not None), default=None)
