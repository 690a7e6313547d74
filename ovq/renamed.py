"""Classes that have moved and settings that have been renamed, so that older run folders can still be read."""

from __future__ import annotations

from typing import Any

# Stored configs may use old names or new ones; on the command line an old name is an error that gives the new one
# (`ovq.overrides`).
MOVED = {
    f"ovq.mixers.memory_rules.{cls}": f"ovq.mixers.{module}.{cls}"
    for module, cls in (
        ("fifo", "FIFO"),
        ("reservoir", "Reservoir"),
        ("learned_compression", "LearnedCompression"),
        ("kvm", "KVM"),
    )
}
RENAMED = {target: {"num_centroids": "capacity"} for target in MOVED.values()} | {
    "ovq.mixers.ovq.OVQ": {"step": "step_size"}
}
RECALL = "data.tasks.recall.RecallTask"


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """A stored config with current names, so that a run started before something was renamed can still be resumed."""
    for settings in values.get("model", {}).get("mixers", {}).values():
        target = settings.get("_target_")
        if target in MOVED:
            target = settings["_target_"] = MOVED[target]
        for old, new in RENAMED.get(target, {}).items():
            if old in settings:
                settings[new] = settings.pop(old)
    data = values.get("data", {})
    if data.get("kind") == "recall":
        data |= {"kind": "task", "task": {"_target_": RECALL, **(data.get("task") or {})}}
    elif data.get("task", {}) is None:
        data["task"] = {}
    return values
