"""Peak speed and health of GPUs; needs neither torch nor a GPU."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from trainer.telemetry.feedback import Health

# Dense BF16 on tensor cores, FLOP/s, by the device's full name: a MIG slice ("… MIG 1g.10gb") or a
# model with fewer units (H800, H20, GH200) must not match the full device. NVIDIA quotes most
# numbers with 2:4 sparsity, which are twice these.
PEAK_FLOPS = {
    # SXM5; "H100 Tensor Core GPU" data sheet: 1,979 TFLOPS with sparsity
    r"NVIDIA H100 \d+GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,  # the same sheet, 2022: 1,513 with sparsity
    r"NVIDIA H200": 989e12,  # SXM; "H200 Tensor Core GPU" data sheet: 1,979 with sparsity
    # "A100" data sheet: 312, 624 with sparsity
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA L40S": 362e12,  # "L40S" data sheet: 362.05, 733 with sparsity
    r"NVIDIA B200": 2250e12,  # "HGX B200", 8 GPUs: 36 PFLOPS with sparsity
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense BF16 by `torch.cuda.get_device_name()`; None for an unknown device."""
    return next(
        (peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, device_name)), None
    )


def gpu_health(uuid: str) -> Health | None:
    """Memory, load, temperature and power of a GPU, from nvidia-ml-py.

    None without that package, a driver or that GPU. `uuid` is that of
    `torch.cuda.get_device_properties(i)`: NVML also counts GPUs that CUDA_VISIBLE_DEVICES hides, so
    torch's index could name another GPU. Takes about a millisecond: not for every step.
    """
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    try:
        gpu = _gpu_handle(uuid)
    except pynvml.NVMLError:
        return None

    def query(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(gpu, *args)
        except pynvml.NVMLError:
            return None  # passively cooled, virtual and MIG devices do not report everything

    memory = query(pynvml.nvmlDeviceGetMemoryInfo)
    rates = query(pynvml.nvmlDeviceGetUtilizationRates)
    milliwatts = query(pynvml.nvmlDeviceGetPowerUsage)
    return Health(
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        utilisation=None if rates is None else rates.gpu / 100,
        temperature_celsius=query(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        power_watts=None if milliwatts is None else milliwatts / 1000,
    )


class WorstHealth(NamedTuple):
    """The worst of several GPUs, figure by figure, and the rank that each figure is of."""

    health: Health | None
    ranks: dict[str, int]


def worst_health(by_rank: Sequence[Health | None]) -> WorstHealth:
    """The highest figures of all ranks, of utilisation and total memory the lowest.

    A GPU that is idle while others compute, or hotter than they are, slows all of them down.
    """
    known = {rank: asdict(health) for rank, health in enumerate(by_rank) if health is not None}
    worst, ranks = {}, {}
    for name in (figure.name for figure in fields(Health)):
        figures = {rank: f[name] for rank, f in known.items() if f[name] is not None}
        if figures:
            pick = min if name in ("utilisation", "memory_total_bytes") else max
            ranks[name] = pick(figures, key=figures.__getitem__)
            worst[name] = figures[ranks[name]]
    return WorstHealth(Health(**worst) if known else None, ranks)


@functools.cache
def _gpu_handle(uuid: str) -> Any:
    import pynvml

    pynvml.nvmlInit()  # once a process; loading the driver's library takes tens of milliseconds
    return pynvml.nvmlDeviceGetHandleByUUID(
        uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    )
