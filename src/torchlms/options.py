"""Options: what the user asked for, read and checked before anything is changed."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchlms.core.plan import Budget, Plan
from torchlms.core.rules import Rules
from torchlms.errors import BadOption, NotSupported, PlanMismatch
from torchlms.memory.device import read_device, supported
from torchlms.memory.limits import disk_free_bytes, format_bytes, host_available_bytes, parse_option
from torchlms.memory.spill_place import directory_for
from torchlms.rule_text import with_sizes

log = logging.getLogger("torchlms")

Size = str | int | float | None
PlanSource = Plan | str | os.PathLike[str] | bool | None

_HOST_SHARE = 0.9  # of what is available, by default
_DISK_SHARE = 0.9
_VERIFY_EVERY = 100  # steps
_LEAST_BUDGET_BYTES = 4096  # whoever writes less forgot a unit
_SOME_WHOLE = 1 << 62  # to read a percentage before its whole is known


@dataclass(frozen=True, slots=True)
class Options:
    """The keywords of ``LMS``, each in its final form as far as no device is needed for it."""

    torch_device: torch.device
    budget: Size
    host_budget: Size
    disk_budget: Size
    disk_dir: Path
    plan: Plan | None
    planning: bool  # or else values leave only when memory runs out
    rules: Rules
    verify_every: int  # steps between two that are checked; 0: none is

    @staticmethod
    def read(
        model: torch.nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        *,
        device: torch.device | str | None,
        budget: Size,
        host_budget: Size,
        disk_budget: Size,
        disk_dir: str | os.PathLike[str] | None,
        plan: PlanSource,
        rules: Rules | dict[str, Any] | None,
        recompute: bool | None,
        verify: bool | int,
        snapshot: bool,
    ) -> Options:
        """Check what can be checked now; BadOption, PlanMismatch or NotSupported say what is wrong."""
        if model is not None and not isinstance(model, torch.nn.Module):
            raise BadOption(
                f"model must be a torch.nn.Module, not {type(model).__name__}; budget is a keyword"
            )
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise BadOption(
                f"optimizer must be one torch optimizer, not {type(optimizer).__name__}. With several, leave "
                "it out: it is asked for its states, which stay all the same, and for snapshot=True"
            )
        for name, size in (("budget", budget), ("host_budget", host_budget), ("disk_budget", disk_budget)):
            if size is not None:
                parse_option(name, size, whole_bytes=_SOME_WHOLE, or_none=name != "budget")
        if not isinstance(snapshot, bool):
            raise BadOption(f"snapshot={snapshot!r}: write True or False")
        if snapshot and optimizer is None:
            raise BadOption(
                "snapshot=True keeps what an optimizer had before its step: give LMS the optimizer"
            )
        if not isinstance(rules, (Rules, dict, type(None))):
            raise BadOption(f"rules={rules!r}: give a Rules, or a dict such as {{'min_bytes': 1048576}}")
        if (
            not isinstance(disk_dir, (str, os.PathLike, type(None)))
            or str(disk_dir) == ""
            or "\0" in str(disk_dir)
        ):
            raise BadOption(f"disk_dir={disk_dir!r}: give a path")
        if disk_dir is not None:
            _check_directory(Path(disk_dir))
        return Options(
            torch_device=_choose_device(model, device),
            budget=budget,
            host_budget=host_budget,
            disk_budget=disk_budget,
            disk_dir=directory_for(disk_dir),
            plan=_read_plan(plan),
            planning=plan is not False,
            rules=_read_rules(rules, recompute),
            verify_every=_read_verify(verify),
        )

    def tiers(self, *, whole_bytes: int, available_bytes: int) -> Budget:
        """Bytes on each tier, given what the device has in all and what of that is to be had."""
        return Budget(
            device_bytes=self.device_bytes(whole_bytes=whole_bytes, available_bytes=available_bytes),
            host_bytes=_or_share("host_budget", self.host_budget, host_available_bytes(), _HOST_SHARE),
            disk_bytes=_or_share(
                "disk_budget", self.disk_budget, disk_free_bytes(self.disk_dir), _DISK_SHARE
            ),
        )

    def device_bytes(self, *, whole_bytes: int, available_bytes: int) -> int:
        """The device's part of ``tiers``."""
        if self.budget is None:
            device_bytes = available_bytes
        else:
            device_bytes = parse_option("budget", self.budget, whole_bytes=whole_bytes)
        if device_bytes < _LEAST_BUDGET_BYTES:
            raise BadOption(
                f"budget={self.budget!r} is {device_bytes} bytes: write a percentage or a unit, such as "
                "'80%' or '16GiB'"
            )
        if device_bytes > whole_bytes:
            raise BadOption(
                f"a budget of {format_bytes(device_bytes)} is more than {self.torch_device} has "
                f"({format_bytes(whole_bytes)}): leave budget out to use all of it"
            )
        if self.plan is not None and self.plan.budget.device_bytes > device_bytes:
            raise PlanMismatch(
                f"the plan given was made for {format_bytes(self.plan.budget.device_bytes)}, more than the "
                f"budget of {format_bytes(device_bytes)}: leave plan= out to make a new one"
            )
        return device_bytes


def _check_directory(path: Path) -> None:
    """BadOption if no file could be made in ``path``, which need not be there yet."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise BadOption(f"disk_dir={str(path)!r}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadOption(f"disk_dir={str(path)!r}: no permission to write in {there}")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:  # where root may do all, and the filesystem can do nothing
        raise BadOption(f"disk_dir={str(path)!r}: no file can be made in {there}: {error.strerror}") from None


def _read_rules(rules: Rules | dict[str, Any] | None, recompute: bool | None) -> Rules:
    read = rules if isinstance(rules, Rules) else Rules.read(with_sizes(rules or {}))
    return read if recompute is None else replace(read, recompute=recompute)


def _read_verify(verify: bool | int) -> int:
    if verify is True or verify is False:
        return _VERIFY_EVERY if verify else 0
    if not isinstance(verify, int) or verify < 1:
        raise BadOption(f"verify={verify!r}: write True, or every how many steps to check, such as verify=50")
    return verify


def _or_share(name: str, size: Size, available_bytes: int, share: float) -> int:
    """What may be used of a tier: no more than there is, whatever was asked for."""
    if size is None:
        return int(share * available_bytes)
    asked_bytes = parse_option(name, size, whole_bytes=available_bytes, or_none=True)
    if asked_bytes > available_bytes:
        log.warning(
            "%s: %s were asked for, and %s are free, %s less: that is what there is to use",
            name,
            format_bytes(asked_bytes),
            format_bytes(available_bytes),
            format_bytes(asked_bytes - available_bytes, up=True),
        )
    return min(asked_bytes, available_bytes)


def _read_plan(source: PlanSource) -> Plan | None:
    if source is False:
        return None
    if not isinstance(source, (Plan, str, os.PathLike, type(None))):
        raise BadOption(f"plan={source!r}: give a Plan, the path of a plan file, or False for none at all")
    plan = source if source is None or isinstance(source, Plan) else Plan.load(os.fspath(source))
    if plan is not None and plan.torch != torch.__version__:
        raise PlanMismatch(
            f"the plan given was made with torch {plan.torch}, this is {torch.__version__}: "
            "leave plan= out to make a new one"
        )
    return plan


def _choose_device(model: torch.nn.Module | None, device: torch.device | str | None) -> torch.device:
    asked = None if device is None else read_device(device)
    found = set()
    if model is not None:
        found = {item.device for item in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        names = ", ".join(sorted(str(item) for item in found))
        raise NotSupported(f"the model lies on several devices ({names}): LMS handles one device a process")
    here = found.pop() if found else None
    if asked is not None and here is not None and asked != here:
        raise BadOption(f"device={device} was asked for, but the model is on {here}")
    return supported(here or asked or read_device(None))
