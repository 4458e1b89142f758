"""What bounds an update, from a profile, and the memory that the process takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
            "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")  # fmt: skip
# Matrix products: parts of the names of CUDA kernels, and operations of the CPU.
KERNELS = ("gemm", "gemv", "cutlass", "nvjet", "xmma", "triton_tem")
OPERATIONS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}
LARGEST = 8  # kernels or operations that are listed


def profile(engine: Any, seconds: float, floor: float) -> dict[str, Any]:
    """Where an update goes.

    Args:
        engine: a warm one.
        seconds: of one update, measured without the profiler, which slows the host down.
        floor: seconds of its arithmetic at the full rate.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    cuda = engine.agent.device.type == "cuda"
    updates = 100 if cuda else 4
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        engine.run(updates)
        engine.wait()
    engine.read()
    events = profiler.key_averages()
    if cuda:
        work = [
            (event.key, event.self_device_time_total, event.count)
            for event in events
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        launches = sum(event.count for event in events if event.key in LAUNCHES)
    else:
        work = [(e.key, e.self_cpu_time_total, e.count) for e in events if "::" in e.key]
        launches = sum(count for _, _, count in work)
    return breakdown(work, updates, launches, seconds, floor, cuda)


def breakdown(
    work: list[tuple[str, float, int]],
    updates: int,
    launches: int,
    seconds: float,
    floor: float,
    cuda: bool,
) -> dict[str, Any]:
    """Shares of an update, from ``(name, µs, count)`` of every kernel or operation, summed.

    ``share`` holds matrix products, other kernels, and what is left: time in which the device waits
    for the host (on a CPU: the interpreter). The largest of them bounds the update; products do so
    by arithmetic where the floor is more than half of their time, else by their small size.
    """
    products = sum(us for name, us, _ in work if is_product(name))
    others = sum(us for _, us, _ in work) - products
    share = {
        "products": 1e-6 * products / updates / seconds,
        "others": 1e-6 * others / updates / seconds,
    }
    share["idle"] = max(0.0, 1 - share["products"] - share["others"])
    full = floor / seconds > 0.5 * share["products"]
    bound = {
        "products": "arithmetic" if full else "products too small for the full rate",
        "others": "memory (element-wise passes)",
        "idle": "launches" if cuda else "the interpreter",
    }
    largest = sorted(work, key=lambda item: -item[1])[:LARGEST]
    return {
        "operations": sum(count for _, _, count in work) / updates,
        "launches": launches / updates,
        "share": share,
        "floor_share": floor / seconds,
        "bound_by": bound[max(share, key=share.__getitem__)],
        "largest": [
            {"name": name[:80], "us": us / updates, "count": count / updates}
            for name, us, count in largest
        ],
    }


def is_product(name: str) -> bool:
    return name in OPERATIONS or any(part in name.lower() for part in KERNELS)


def reset_memory(device: str) -> int:
    """Bytes in use now; `peak_memory` counts from here on (Linux, or a GPU)."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    return peak_memory(device)


def peak_memory(device: str) -> int:
    """Most bytes since `reset_memory`: tensors on a GPU, resident memory of the process else."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
