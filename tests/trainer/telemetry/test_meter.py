"""Where the time goes under an injected clock, the arithmetic of rates, spikes against an oracle,
sinks.
"""

import json
import math
import statistics
import sys
import types
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.feedback_reports import NOW, summary
from trainer.telemetry import devices
from trainer.telemetry.devices import gpu_health, peak_flops, worst_health
from trainer.telemetry.feedback import Health, Source, Totals, read_lines, read_summaries, resumed
from trainer.telemetry.feedback_writer import Writer
from trainer.telemetry.meter import Meter, SourceSums, SpikeDetector, mfu, sum_by_source
from trainer.telemetry.records import read_metrics
from trainer.telemetry.sinks import Telemetry, console, console_line, flatten


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def run(meter, clock, *, steps, wait=0.0, compute=1.0, tokens=100):
    for _ in range(steps):
        with meter.part("data_wait"):
            clock.pass_(wait)
        clock.pass_(compute)
        meter.step(tokens=tokens)


# --- seconds by part ------------------------------------------------------------------------------


def test_every_second_belongs_to_one_part():
    clock = Clock()
    meter = Meter(clock=clock)
    with meter.part("restart"):
        clock.pass_(7)
    with meter.part("data_wait"):
        clock.pass_(1)
    clock.pass_(2)
    with meter.part("evaluation"):
        clock.pass_(4)
        with meter.part("data_wait"):  # the innermost part has it
            clock.pass_(8)
        clock.pass_(16)
    with pytest.raises(RuntimeError), meter.part("checkpoint"):
        clock.pass_(32)
        raise RuntimeError
    clock.pass_(64)
    step = meter.step(tokens=1)
    assert step.seconds == {
        "restart": 7,
        "data_wait": 9,
        "compute": 66,
        "evaluation": 20,
        "checkpoint": 32,
    }
    assert meter.totals.wall_seconds == sum(step.seconds.values())
    assert meter.totals.useful_seconds == 66


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["compute", "data_wait", "checkpoint", "evaluation", "restart", "step"]),
        st.integers(0, 50),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(1, 5))
def test_rates_against_a_diary(events, window):
    """Oracle: a list of all seconds by step, summed anew. Whole seconds, so that sums are exact."""
    clock = Clock()
    meter = Meter(clock=clock, window=window)
    diary, steps = {}, []
    for part, amount in events:
        if part == "step":
            meter.step(tokens=amount)
            steps.append((diary, amount))
            diary = {}
            continue
        if part == "compute":
            clock.pass_(amount)
        else:
            with meter.part(part):
                clock.pass_(amount)
        diary[part] = diary.get(part, 0) + amount
    recent = steps[-window:]
    sums = {p: sum(d.get(p, 0) for d, _ in recent) for p in ("compute", "data_wait")}
    total = sum(sum(d.values()) for d, _ in recent) + sum(diary.values())
    tokens = sum(t for _, t in recent)
    shares = [
        0 if not d.get("data_wait") else d["data_wait"] / (d["data_wait"] + d.get("compute", 0))
        for d, _ in recent
    ]
    everything = sum(sum(d.values()) for d, _ in steps) + sum(diary.values())
    useful = sum(d.get("compute", 0) for d, _ in steps)
    rates = meter.rates()
    wait = sums["data_wait"] + diary.get("data_wait", 0)
    assert rates.tokens_per_second == (tokens / total if total else None)
    assert rates.tokens_per_second_without_stalls == (
        tokens / sums["compute"] if sums["compute"] else None
    )
    assert rates.step_seconds == (
        (sums["compute"] + sums["data_wait"]) / len(recent)
        if recent and sum(sums.values())
        else (0.0 if recent else None)
    )
    assert rates.data_wait_share == (
        wait / (wait + sums["compute"]) if wait + sums["compute"] else None
    )
    assert rates.data_wait_p50 == (
        float(np.percentile(shares, 50, method="inverted_cdf")) if shares else None
    )
    assert rates.data_wait_p99 == (
        float(np.percentile(shares, 99, method="inverted_cdf")) if shares else None
    )
    assert rates.goodput == (useful / everything if everything else None)
    assert (meter.totals.steps, meter.totals.tokens) == (len(steps), sum(t for _, t in steps))


def test_a_slow_reader_raises_data_wait_and_nothing_else():
    measured = {}
    for wait in (0.01, 3.0):
        clock = Clock()
        meter = Meter(clock=clock)
        run(meter, clock, steps=200, wait=wait)
        with meter.part("checkpoint"):
            clock.pass_(5)
        step = meter.step(tokens=0)
        measured[wait] = (meter.rates(), step.seconds, meter.totals)
    (fast, fast_step, fast_totals), (slow, slow_step, slow_totals) = measured.values()
    assert fast.data_wait_p99 < 0.01 and slow.data_wait_p50 == pytest.approx(0.75)
    assert slow.data_wait_share == pytest.approx(0.75, abs=0.01)
    assert slow.tokens_per_second < fast.tokens_per_second / 3
    assert slow.tokens_per_second_without_stalls == pytest.approx(
        fast.tokens_per_second_without_stalls
    )
    assert slow_step["checkpoint"] == fast_step["checkpoint"] == 5
    assert slow_totals._replace(wall_seconds=0, useful_seconds=0) == fast_totals._replace(
        wall_seconds=0, useful_seconds=0
    )
    assert slow_totals.useful_seconds == pytest.approx(fast_totals.useful_seconds)


@pytest.mark.parametrize(("overlap", "wait"), [(-5.0, 3), (0.0, 3), (1.0, 2), (9.0, 0)])
def test_what_the_device_worked_meanwhile_is_not_a_wait_for_data(overlap, wait):
    """A share that is moved, never more than there was; no second is lost or made."""
    clock = Clock()
    meter = Meter(clock=clock)
    with meter.part("data_wait"):
        clock.pass_(3)
    meter.move(overlap, "data_wait", "compute")
    clock.pass_(4)
    seconds = meter.step(tokens=1).seconds
    assert (seconds["data_wait"], seconds.total()) == (wait, 7)


def test_one_slow_batch_in_fifty_shows_at_p99_and_not_at_p50():
    clock = Clock()
    meter = Meter(clock=clock, window=100)
    for _ in range(2):
        run(meter, clock, steps=49, wait=0.0)
        run(meter, clock, steps=1, wait=9.0)
    assert (meter.rates().data_wait_p50, meter.rates().data_wait_p99) == (0.0, 0.9)


def test_a_wait_for_supply_shows_while_it_lasts():
    clock = Clock()
    meter = Meter(clock=clock)
    run(meter, clock, steps=10)
    assert meter.rates().tokens_per_second == 100.0
    with meter.part("data_wait"):
        clock.pass_(90)
        rates = meter.rates()
        assert (rates.tokens_per_second, rates.tokens_per_second_without_stalls) == (10.0, 100.0)
        assert rates.data_wait_share == 0.9
        clock.pass_(900)
        assert meter.rates().tokens_per_second == 1.0


# --- restarts -------------------------------------------------------------------------------------


def test_goodput_loses_what_a_restart_threw_away_and_the_time_between(tmp_path):
    clock, wall = Clock(), Clock()
    meter = Meter(clock=clock)
    writer = Writer(str(tmp_path), trainer="a", monotonic=clock, wall=wall)
    run(meter, clock, steps=60, tokens=10)
    checkpoint = Totals(**json.loads(json.dumps(meter.totals._asdict())))
    run(meter, clock, steps=20, tokens=10)  # lost
    wall.pass_(80)
    writer.write(meter.report("running", mfu=None, health=None, budget=None))
    assert writer.flush()

    wall.pass_(40)  # nobody runs
    again = Writer(str(tmp_path), trainer="a", wall=wall)
    totals = resumed(checkpoint, again.previous, now=wall())
    clock = Clock()
    clock.pass_(12345.0)  # another machine's monotonic clock
    meter = Meter(totals, clock=clock)
    assert (totals.steps, totals.tokens, totals.tokens_processed, totals.restarts) == (
        60,
        600,
        800,
        1,
    )
    with meter.part("restart"):
        clock.pass_(40)
    run(meter, clock, steps=40, tokens=10)  # 20 of them replay
    totals = meter.totals
    assert (totals.steps, totals.tokens, totals.tokens_processed) == (100, 1000, 1200)
    assert totals.wall_seconds == pytest.approx(80 + 40 + 40 + 40)
    assert meter.rates().goodput == pytest.approx(100 / 200)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(-50, 50))
def test_goodput_is_a_share_even_when_feedback_was_older_than_the_checkpoint(done, more, skew):
    clock = Clock()
    meter = Meter(clock=clock)
    run(meter, clock, steps=done)
    last = meter.report("running", mfu=None, health=None, budget=None)
    run(meter, clock, steps=more)
    line = replace(summary(time="2027-01-15T08:00:00+00:00"), report=last)
    meter = Meter(resumed(meter.totals, line, now=NOW + skew), clock=clock)
    run(meter, clock, steps=1)
    assert 0 < meter.rates().goodput <= 1


def test_feedback_agrees_with_the_trainers_own_totals(tmp_path):
    clock = Clock()
    meter = Meter(clock=clock)
    writer = Writer(str(tmp_path), trainer="a", every_seconds=5, monotonic=clock)
    for step in range(1, 51):
        clock.pass_(1)
        meter.step(
            tokens=64,
            sources={
                "cc": SourceSums({f"gen-{1 + step // 30:04}": 2}, 40, 80.0, 39),
                "wiki": SourceSums({"gen-0001": 1}, 24, 23.0, 23),
            },
        )
        if writer.due():
            writer.write(
                meter.report("running", mfu=0.41, health=None, budget=10_000 - meter.totals.tokens)
            )
            assert writer.flush()
            said = read_summaries(str(tmp_path)).summaries[0].report
            assert (said.steps, said.tokens_total, said.budget) == (
                step,
                step * 64,
                10_000 - step * 64,
            )
    writer.close(meter.report("stopped", mfu=0.41, health=None, budget=0))
    lines = read_lines(str(tmp_path), "a").summaries
    assert [line.report.steps for line in lines] == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46, 50]
    last = lines[-1].report
    assert last.sources["cc"].rows == {"gen-0001": 58, "gen-0002": 42}
    assert (last.sources["cc"].generation, last.sources["wiki"].generation) == (
        "gen-0002",
        "gen-0001",
    )
    assert sum(source.tokens for source in last.sources.values()) == last.tokens_total == 3200
    assert last.sources["cc"].loss == pytest.approx(80 / 39)
    assert last.tokens_per_second == 64.0
    assert last.state == "stopped"


def test_sources_go_on_from_a_checkpoint_and_keep_what_is_read_no_more():
    before = Totals(
        sources={
            "old": {"rows": {"gen-9999": 5, "gen-10000": 1}, "tokens": 60},
            "cc": {"rows": {"gen-0001": 2}, "tokens": 20},
        }
    )
    meter = Meter(before, clock=Clock())
    meter.step(tokens=10, sources={"cc": SourceSums({"gen-0001": 1}, 10, 0.0, 0)})
    sources = meter.report("running", mfu=None, health=None, budget=None).sources
    assert sources["cc"] == Source("gen-0001", {"gen-0001": 3}, 30, None)
    assert sources["old"] == Source("gen-10000", {"gen-9999": 5, "gen-10000": 1}, 60, None)
    assert before.sources["cc"]["rows"] == {"gen-0001": 2}
    assert meter.totals.sources["cc"] == {"rows": {"gen-0001": 3}, "tokens": 30}


TAKEN = st.builds(
    SourceSums,
    st.dictionaries(st.sampled_from("gh"), st.integers(0, 9)),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
)


@given(st.lists(st.dictionaries(st.sampled_from("ab"), TAKEN), max_size=5))
def test_ranks_add_up(parts):
    total = sum_by_source(parts)
    assert total.keys() == {name for part in parts for name in part}
    for name, taken in total.items():
        mine = [part[name] for part in parts if name in part]
        for column in ("tokens", "loss_sum", "targets"):
            assert getattr(taken, column) == sum(getattr(one, column) for one in mine)
        assert taken.rows == {
            g: sum(m.rows.get(g, 0) for m in mine) for g in {g for m in mine for g in m.rows}
        }


# --- arithmetic -----------------------------------------------------------------------------------


def test_mfu_of_a_published_run():
    # llm-foundry's README: 1.3B (24 layers, width 2048), 8 H100 SXM, sequence 2048, BF16: 42 % at
    # 45.5k tokens/s/GPU
    flops_per_token = 6 * 1.316e9 + 12 * 24 * 2048 * 2048
    found = mfu(
        8 * 45_500, flops_per_token=flops_per_token, peak=8 * peak_flops("NVIDIA H100 80GB HBM3")
    )
    assert found == pytest.approx(0.42, abs=0.01)


@pytest.mark.parametrize("rate, peak", [(None, 1e12), (1.0, None)])
def test_mfu_without_a_rate_or_a_peak_is_unknown(rate, peak):
    assert mfu(rate, flops_per_token=6.0, peak=peak) is None


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40", None),
        ("NVIDIA H20", None),
        ("NVIDIA H800", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_of_this_very_device(name, peak):
    assert peak_flops(name) == peak


# --- spikes ---------------------------------------------------------------------------------------

LOSSES = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf, 2.0, 2.5, 100.0])


@given(st.lists(LOSSES, max_size=60), st.integers(2, 8), st.sampled_from([0.5, 1.0, 2.0]))
def test_spikes_against_an_oracle(losses, window, sigmas):
    spikes, finite = SpikeDetector(sigmas=sigmas, window=window), []
    for loss in losses:
        found = spikes.observe(loss)
        if not math.isfinite(loss):
            assert found
            continue
        recent = finite[-window:]
        if len(recent) < window:
            assert not found
        else:
            bound = statistics.fmean(recent) + sigmas * statistics.stdev(recent)
            near = abs(loss - bound) <= 1e-6 * (1 + abs(bound))  # rounding decides there
            assert near or found == (loss > bound)
        finite.append(loss)
    assert spikes.losses == finite[-window:]


def test_a_spike_is_found_once_and_a_new_level_becomes_normal():
    noise = [3.0 + 0.01 * math.sin(i) for i in range(1000)]
    spikes = SpikeDetector()
    assert not any(spikes.observe(loss) for loss in noise)
    assert [spikes.observe(loss) for loss in (3.02, 9.0, 3.01)] == [False, True, False]
    assert sum(spikes.observe(loss + 1.0) for loss in noise) <= 2
    assert not spikes.observe(0.0)  # a fall is none


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(2, 150))
def test_a_constant_loss_never_spikes(loss, window):
    spikes = SpikeDetector(window=window)
    assert not any(spikes.observe(loss) for _ in range(window + 20))


def test_spikes_go_on_from_a_checkpoint():
    losses = [3.0 + 0.1 * (i % 7) for i in range(300)] + [5.0]
    whole, first = SpikeDetector(), SpikeDetector()
    expected = [whole.observe(loss) for loss in losses]
    for loss in losses[:200]:
        first.observe(loss)
    second = SpikeDetector(json.loads(json.dumps(first.losses)))
    assert [second.observe(loss) for loss in losses[200:]] == expected[200:]
    assert expected[-1]


# --- GPU health -----------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


def fake_nvml(**missing):
    """pynvml of one GPU; functions named in `missing` are not supported."""

    def by_uuid(uuid):
        if uuid != "GPU-11":
            raise NVMLError("not found")
        return "handle"

    def answer(name, value):
        def function(handle, *_):
            assert handle == "handle"
            if name in missing:
                raise NVMLError("not supported")
            return value

        return function

    module = types.ModuleType("pynvml")
    module.NVMLError, module.NVML_TEMPERATURE_GPU = NVMLError, 0
    module.nvmlInit, module.nvmlDeviceGetHandleByUUID = lambda: None, by_uuid
    module.nvmlDeviceGetMemoryInfo = answer("memory", types.SimpleNamespace(used=5, total=9))
    module.nvmlDeviceGetUtilizationRates = answer(
        "utilisation", types.SimpleNamespace(gpu=97, memory=3)
    )
    module.nvmlDeviceGetTemperature = answer("temperature", 61)
    module.nvmlDeviceGetPowerUsage = answer("power", 640_500)
    return module


@pytest.mark.parametrize(
    "missing, expected",
    [
        ({}, Health(5, 9, 0.97, 61, 640.5)),
        ({"power": 1, "utilisation": 1}, Health(5, 9, None, 61, None)),
        ({"memory": 1, "temperature": 1}, Health(None, None, 0.97, None, 640.5)),
    ],
)
def test_health_is_what_the_driver_tells(monkeypatch, missing, expected):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**missing))
    devices._gpu_handle.cache_clear()
    assert gpu_health("11") == gpu_health("GPU-11") == expected
    assert gpu_health("another") is None
    devices._gpu_handle.cache_clear()


def test_health_without_a_driver_or_the_package_is_unknown(monkeypatch):
    def no_driver():
        raise NVMLError("driver not loaded")

    nvml = fake_nvml()
    nvml.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_health("11") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_health("11") is None


def test_the_worst_of_all_ranks_is_the_highest_figure_and_the_lowest_load():
    one, two = Health(5, 9, 0.97, 61, 640.5), Health(4, 8, 0.4, 83, None)
    assert worst_health([None, one, two]) == (
        Health(5, 8, 0.4, 83, 640.5),
        {
            "memory_used_bytes": 1,
            "memory_total_bytes": 2,
            "utilisation": 2,
            "temperature_celsius": 2,
            "power_watts": 1,
        },
    )
    assert worst_health([None, None]) == worst_health([]) == (None, {})


# --- sinks ----------------------------------------------------------------------------------------

RECORD = {
    "step": 7,
    "loss": 3.25,
    "mfu": None,
    "spike": False,
    "seconds": {"compute": 0.5},
    "sources": {"cc": {"loss": 3.5}},
}


def test_a_record_as_numbers():
    assert flatten(RECORD) == {
        "step": 7.0,
        "loss": 3.25,
        "spike": 0.0,
        "seconds/compute": 0.5,
        "sources/cc/loss": 3.5,
    }


def test_the_console_says_unknown_and_leaves_out_what_was_not_measured():
    assert console_line(RECORD) == "step 7  loss 3.2500  MFU unknown"
    gpu = asdict(Health(5 << 30, None, 0.97, 61, 640.5))
    assert (
        console_line({"step": 2, **gpu})
        == "step 2  GPU bytes 5,368,709,120  busy 97%  °C 61  W 640"
    )
    assert (
        console_line({"step": 1_000, "mfu": 0.4112, "loss": math.nan, "spike": True})
        == "step 1,000  loss nan  MFU 41.1%  SPIKE"
    )


def test_the_console_shows_the_loss_over_held_out_rows_and_on_named_sets():
    losses = {"held_out/loss": 3.5, "held_out/perplexity": 33.1, "held_out/wiki/loss": 3.25}
    record = {"step": 4, "loss": 3.0, **losses, "held_out/srv/runs/a/loss": 3.5, "mfu": 0.5}
    assert console_line(record) == ("step 4  loss 3.0000  held out 3.5000  wiki 3.2500  MFU 50.0%")


def test_the_console_prints_every_ten_seconds_and_each_spike_and_evaluation(tmp_path, capsys):
    clock = Clock()
    terminal = console(clock=clock)
    for step in range(25):
        evaluated = {"held_out/loss": 2.0} if step == 16 else {}
        terminal.step({"step": step, "spike": step == 13, **evaluated})
        clock.pass_(1)
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["0", "10", "13", "16"]


def test_a_line_per_step_survives_a_half_line(tmp_path):
    telemetry = Telemetry(tmp_path, run="r", sinks=("jsonl",))
    telemetry.step(RECORD | {"loss": math.nan})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "lo')
    telemetry = Telemetry(tmp_path, run="r", sinks=("jsonl",))
    telemetry.step(RECORD | {"step": 8, "loss": 1.0})
    telemetry.step(RECORD | {"step": 8, "loss": 2.0})  # replayed
    telemetry.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (7, None),
        (8, 2.0),
    ]
    assert telemetry.failed == {}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_that_is_not_installed_says_so_at_the_start(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"telemetry to '{name}'.*install it or remove"):
        Telemetry(tmp_path, run="r", sinks=(name,))


def test_wandb_and_mlflow_get_the_numbers(tmp_path, monkeypatch):
    told = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: told.append(("wandb", numbers, step)),
        finish=lambda: told.append("wandb closed"),
    )
    wandb, mlflow = types.ModuleType("wandb"), types.ModuleType("mlflow")
    wandb.init = lambda **options: told.append(options["id"]) or run
    mlflow.start_run = lambda run_name: told.append(run_name)
    mlflow.log_metrics = lambda numbers, step: told.append(("mlflow", numbers, step))
    mlflow.end_run = lambda: told.append("mlflow closed")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    telemetry = Telemetry(tmp_path, run="r", sinks=("wandb", "mlflow"))
    telemetry.step(RECORD)
    telemetry.close()
    assert told == [
        "r",
        "r",
        ("wandb", flatten(RECORD), 7),
        ("mlflow", flatten(RECORD), 7),
        "wandb closed",
        "mlflow closed",
    ]


def test_a_sink_that_fails_is_dropped_and_the_others_go_on(tmp_path, monkeypatch):
    mlflow = types.ModuleType("mlflow")
    calls = []

    def away(*_args, **_options):
        calls.append(1)
        raise ConnectionError("away")

    mlflow.start_run, mlflow.log_metrics, mlflow.end_run = lambda run_name: None, away, away
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    telemetry = Telemetry(tmp_path, run="r", sinks=("mlflow", "jsonl"))
    telemetry.step(RECORD)
    telemetry.step(RECORD | {"step": 8})
    telemetry.close()
    assert telemetry.failed == {"mlflow": "ConnectionError('away')"}
    assert calls == [1]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [7, 8]


@pytest.mark.train
def test_tensorboard_gets_an_event_file_that_holds_the_tags(tmp_path):
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        pytest.importorskip("tensorboardX")
    telemetry = Telemetry(tmp_path, run="r", sinks=("tensorboard",))
    telemetry.step(RECORD)
    telemetry.close()
    assert telemetry.failed == {}
    [events] = (tmp_path / "tensorboard").glob("events*")
    assert b"sources/cc/loss" in events.read_bytes()
