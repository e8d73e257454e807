"""What the GPU can do at best, and how it is. Neither torch nor a GPU is needed to ask."""

import functools
import re
from collections.abc import Callable
from typing import Any

from trainer.telemetry.feedback import Health

# Dense BF16 on tensor cores, FLOP/s, by the device's full name: a MIG slice ("… MIG 1g.10gb") or a
# model with fewer units (H800, H20, GH200) must not pass for the whole. NVIDIA prints most figures
# with 2:4 sparsity, twice these.
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
    """FLOP/s of dense BF16 for a name as `torch.cuda.get_device_name()` gives it; None for a device
    not in PEAK_FLOPS.
    """
    return next(
        (peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, device_name)), None
    )


def gpu_health(uuid: str) -> Health | None:
    """How a GPU is, by nvidia-ml-py; None without that package, a driver or such a GPU.

    `uuid` as `torch.cuda.get_device_properties(i).uuid` prints it: NVML counts GPUs that
    CUDA_VISIBLE_DEVICES hides, so torch's index would name another one. Takes about a millisecond:
    for the lines of feedback, not for each step.
    """
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    try:
        gpu = _handle(uuid)
    except pynvml.NVMLError:
        return None

    def asked(function: Callable[[Any], Any]) -> Any:
        try:
            return function(gpu)
        except pynvml.NVMLError:
            return None  # passively cooled, virtual or MIG devices do not tell everything

    memory = asked(pynvml.nvmlDeviceGetMemoryInfo)
    rates = asked(pynvml.nvmlDeviceGetUtilizationRates)
    milliwatts = asked(pynvml.nvmlDeviceGetPowerUsage)
    return Health(
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        utilisation=None if rates is None else rates.gpu / 100,
        temperature_celsius=asked(
            lambda handle: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
        power_watts=None if milliwatts is None else milliwatts / 1000,
    )


@functools.cache
def _handle(uuid: str) -> Any:
    import pynvml

    pynvml.nvmlInit()  # once a process; loading the driver's library takes tens of milliseconds
    return pynvml.nvmlDeviceGetHandleByUUID(
        uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    )
