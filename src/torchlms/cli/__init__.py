"""cli: the ``torchlms`` command. Each verb reads options and calls one function; here they stand in order."""

from __future__ import annotations

from torchlms.cli import bench, fit, machine, report, run
from torchlms.cli.root import add, app, debugging, script_to_run

__all__ = ["app", "debugging", "script_to_run"]

# As they are listed: what is wanted first comes first. Each with an example, which a test has it read.
add(run.run, "run --budget 16GiB --report train.py --epochs 10", arguments_end_options=True)
add(fit.fit, "fit --model resnet50 --batch-size 200 --budget 16GiB --curve --largest")
add(fit.plan, "plan tape.json --budget 16GiB --save plan.json")
add(bench.bench, "bench --model resnet50 --batch-size 200 --budget 16GiB")
add(bench.demo, "demo")
add(report.report, "report run.json -o report.html --trace trace.json")
add(machine.doctor, "doctor --disk-dir /scratch")
add(machine.probe, "probe --disk-dir /scratch --refresh")
add(machine.version, "version")
