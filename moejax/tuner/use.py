"""What a run has of what was measured: adopted before its program is made, remembered in its folder, and measured first where it asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moejax import compiler_options, processes
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.hub import weights
from moejax.hub.model import architecture
from moejax.models.config import Architecture
from moejax.models.ops import choice
from moejax.progress import note, say
from moejax.tuner import run, store


def sizes(experiment: Experiment) -> tuple[Experiment, Architecture]:
    """With its architecture; no weights are read."""
    source = experiment.model.source
    folder = None if source is None else weights.resolve(source, experiment.model.revision, weights=False)
    config = architecture(experiment, folder)
    return experiment.with_defaults(config), config


def before_start(experiment: Experiment) -> None:
    """At the first start on a card, before this process takes its memory: `device.tune` auto (quick) or full. On a CPU full alone. A run
    whose folder is there is refused later: nothing is measured for it."""
    asked = experiment.device.tune
    if (Path(experiment.runs_dir) / experiment.name).exists():
        return
    if asked == "off" or (asked == "auto" and not compiler_options.nvidia_asked()) or processes.started_with(experiment.mesh):
        return
    say(*run.gains(measure(experiment, full=asked == "full")))


def measure(experiment: Experiment, *, full: bool, anew: bool = False) -> list[dict[str, Any]]:
    """Measure what is not known for this run's shapes (again: all of it), and store it. Returns all that is known of them."""
    experiment, config = sizes(experiment)
    device = store.device_asked()
    made_on, path = store.about(device), store.place(device)
    known = known_of(path, made_on)
    asked = run.plan(experiment, config, device, [] if anew else known, full=full)
    new = [one for one in asked if not one.known and len(one.candidates) > 1]
    form = "full" if full else "quick"
    found = []
    if new:
        say(f"tuning for {made_on['card']}, once for these shapes: at most {run.LIMITS[form] / 60:.0f} minutes (device.tune=off: never)")
        found = run.tune(new, device, seconds=run.LIMITS[form])
        say(run.table(found))
        try:
            store.write(path, made_on, store.merged(known, found))
        except OSError as error:
            note(f"warning: {path} cannot be written ({error.strerror}): what was measured is not remembered")
    shapes = [(one.operation, one.shape) for one in asked]
    return [site for site in store.merged(known, found) if (site["operation"], site["shape"]) in shapes]


def known_of(path: Path, made_on: dict[str, Any]) -> list[dict[str, Any]]:
    """None of a file that is of no use, which is said."""
    try:
        return store.read(path, made_on)
    except store.Unusable as error:
        note(f"warning: {error}")
        return []


def adopt(device: str, sites: list[dict[str, Any]]) -> None:
    """From here on this process's programs are made so."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        shape = {name: site["shape"][name] for name in choice.SHAPES[site["operation"]]}
        entries.setdefault(site["operation"], []).append(shape | site["entry"] | {"measured": "moejax tune"})
    choice.adopt(device, entries)
    if any(entry["loops"] == "host" for entry in entries.get("graphs", ())):
        os.environ[compiler_options.VARIABLE] = "0"


def adopt_stored() -> list[dict[str, Any]]:
    """What is stored for this machine, outside of a run."""
    device = choice.here()
    sites = known_of(store.place(device), store.about(device))
    adopt(device, sites)
    return sites


def for_run(experiment: Experiment, folder: Path, *, resume: bool) -> None:
    """Adopt what is stored for this machine, or, in a run that goes on, what it began with. The run's folder remembers it."""
    device = choice.here()
    made_on, own = store.about(device), folder / store.IN_RUN
    off = experiment.device.tune == "off" or processes.count() > 1
    sites = [] if off else known_of(own if resume else store.place(device), made_on)
    adopt(device, sites)
    if sites:
        winners = [f"{site['operation']} {site['winner']}" for site in sites]
        say(f"tuned on this machine ({own.name}): {', '.join(winners)}")
        if not resume:
            try:
                store.write(own, made_on, sites)
            except OSError as error:
                raise UserError(f"{own} cannot be written ({error.strerror}): make room there, or set device.tune=off") from None
