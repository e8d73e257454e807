"""Peak speed and health of a GPU; needs neither torch nor a GPU."""

import functools
import re
from collections.abc import Callable
from typing import Any

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
    torch's index could name another GPU. Takes about a millisecond: call it per line of feedback,
    not per step.
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


@functools.cache
def _gpu_handle(uuid: str) -> Any:
    import pynvml

    pynvml.nvmlInit()  # once a process; loading the driver's library takes tens of milliseconds
    return pynvml.nvmlDeviceGetHandleByUUID(
        uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    )
