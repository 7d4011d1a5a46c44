"""Device: the driver, the card and its link, against what they should be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from torchlms.doctor.finding import Finding, attention, fine, note
from torchlms.memory.limits import format_bytes
from torchlms.memory.probe import Measurements

_PROC = Path("/proc")
_PCI = Path("/sys/bus/pci/devices")

# Bytes per second of one lane, by its transfer rate in GT/s, after the line code.
_LANE = {2.5: 0.25e9, 5.0: 0.5e9, 8.0: 0.985e9, 16.0: 1.969e9, 32.0: 3.938e9, 64.0: 7.563e9}
_USUAL_SHARE = 0.65  # of the link's own rate: packets and their headers take up to a quarter
_OTHERS_SHARE = 0.05  # of the device, held by others


@dataclass(frozen=True, slots=True)
class Link:
    """A PCI express link as the kernel tells it: what it is now, and what the card could do."""

    gt_per_s: float
    width: int
    most_gt_per_s: float
    most_width: int

    @property
    def most_bytes_per_s(self) -> float:
        return _LANE.get(self.most_gt_per_s, 0.0) * self.most_width


def no_device(environment: Mapping[str, str], proc: Path = _PROC) -> Finding:
    """Why there is no CUDA device: because there is none, or because something hides it."""
    driver = driver_version(proc)
    if not driver:
        return note("device", "the CPU: there is no NVIDIA driver. The budget is on bytes of live tensors")
    if torch.version.cuda is None:
        return attention(
            "device",
            f"NVIDIA driver {driver} is here, but torch {torch.__version__} is built without CUDA",
            "install a CUDA build of torch",
        )
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return note("device", "CUDA_VISIBLE_DEVICES hides all devices", "unset CUDA_VISIBLE_DEVICES")
    return attention(
        "device",
        f"torch for CUDA {torch.version.cuda} sees no device under NVIDIA driver {driver}",
        "run nvidia-smi: it lists the devices and the newest CUDA that the driver knows",
    )


def cuda_device(device: torch.device, measured: Measurements | None) -> Iterator[Finding]:
    """The card that is there: what it is, who else uses it, and its link."""
    properties = torch.cuda.get_device_properties(device)
    driver = driver_version() or "unknown"
    said = f"{properties.name}, driver {driver}, CUDA {torch.version.cuda}"
    built = torch.cuda.get_arch_list()
    if not runs_on(built, properties.major, properties.minor):
        yield attention(
            "device",
            f"{said}: torch is built for {', '.join(built)}, this is {properties.major}.{properties.minor}",
            "install a build of torch for this card",
        )
    else:
        yield fine("device", said)
    yield device_memory(*torch.cuda.mem_get_info(device))
    address = "{:04x}:{:02x}:{:02x}.0".format(
        *(getattr(properties, name, 0) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
    )
    yield from link_findings(read_link(_PCI / address), measured)


def runs_on(built: list[str], major: int, minor: int) -> bool:
    """Whether code for ``built`` runs on such a card: sm_80 on 8.x, compute_80 on all that came after."""
    for name in built:
        match = re.match(r"(sm|compute)_(\d+)(\d)", name)
        if match is None:
            continue
        theirs = int(match[2]), int(match[3])
        if theirs <= (major, minor) and (match[1] == "compute" or theirs[0] == major):
            return True
    return not built


def device_memory(free_bytes: int, total_bytes: int) -> Finding:
    said = f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} are free"
    if free_bytes < (1 - _OTHERS_SHARE) * total_bytes:
        next_step = "nvidia-smi shows who; end them, or set --budget below what is free"
        return note("device memory", f"{said}: other processes hold the rest", next_step)
    return fine("device memory", said)


def link_findings(link: Link | None, measured: Measurements | None) -> Iterator[Finding]:
    """Width by what the kernel says; rate by what was measured, for an idle link says a lower one."""
    if link is None:
        yield note("link", "the kernel does not tell its width and speed here (a container, perhaps)")
    elif link.width < link.most_width:
        yield attention(
            "link",
            f"{link.width} lanes of {link.most_width}: every copy takes {link.most_width / link.width:.0f} "
            "times as long as it could",
            "look at the slot, the riser and the BIOS: something gives the card fewer lanes",
        )
    else:
        yield fine("link", f"{link.width} lanes at up to {link.most_gt_per_s:g} GT/s")
    yield link_rate(link, measured)


def link_rate(link: Link | None, measured: Measurements | None) -> Finding:
    if measured is None or not measured.link:
        return note("link rate", "not measured yet", "torchlms probe (seconds; LMS does it when first used)")
    size, out_s, in_s = measured.link[-1]
    out, into = size / out_s, size / in_s
    said = f"{out / 1e9:.1f} GB/s out, {into / 1e9:.1f} GB/s in"
    most = link.most_bytes_per_s if link is not None else 0.0
    if measured.pin_bytes_per_s == 0:
        return attention(
            "link rate",
            f"{said}; host memory could not be pinned, so that copies do not run beside computing",
            "ulimit -l unlimited (in containers: --ulimit memlock=-1), then torchlms probe --refresh",
        )
    if most and min(out, into) < _USUAL_SHARE * most:
        return attention(
            "link rate",
            f"{said}, of {most / 1e9:.0f} GB/s that the link is made for",
            "torchlms probe --refresh on the idle machine; if it stays so, look at the NUMA node of the "
            "process (numactl --cpunodebind) and at other traffic on the link",
        )
    of = f" of {most / 1e9:.0f} GB/s that the link is made for" if most else ""
    return fine("link rate", said + of)


def read_link(folder: Path) -> Link | None:
    """From the kernel's folder of a PCI device; None where it does not tell."""
    figures = []
    for name in ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width"):
        try:
            match = re.match(r"[\d.]+", (folder / name).read_text())
        except OSError:
            return None
        if match is None or float(match[0]) <= 0:
            return None
        figures.append(float(match[0]))
    speed, width, most_speed, most_width = figures
    return Link(speed, int(width), most_speed, int(most_width))


def driver_version(proc: Path = _PROC) -> str:
    """Of NVIDIA's kernel module; "" if it is not loaded."""
    try:
        text = (proc / "driver" / "nvidia" / "version").read_text()
    except OSError:
        return "unknown" if os.path.exists("/dev/nvidiactl") and proc == _PROC else ""
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else "unknown"
