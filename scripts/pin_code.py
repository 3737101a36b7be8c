"""Write tests/golden/code.json: version and code digest of every stage and component, so that they move together.

Plain, it takes over what is new, gone or has another version. Code that changed under the same version is refused:
raise the version, or give `--same-numbers "why"`, which writes the reason beside the new digest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmsweep import component, provenance
from rmsweep.source import Code
from rmsweep.versions import STAGES

FILE = Path(__file__).resolve().parents[1] / "tests" / "golden" / "code.json"
COMPONENT_GROUPS = (*dict.fromkeys(group for groups in provenance.GROUPS.values() for group in groups), "objective")
Pins = dict[str, dict[str, Any]]


def current(code: Code | None = None) -> Pins:
    """Version and digest by name, such as `stage train` or `reward_model mlp`; what stages reach is theirs alone."""
    code = code or Code()
    pins = {
        f"stage {stage}": {"version": STAGES[stage], "code": code.digest(roots)}
        for stage, roots in provenance.ROOTS.items()
    }
    shared = [root for roots in provenance.ROOTS.values() for root in roots]
    for group in COMPONENT_GROUPS:
        for kind in component.kinds(group):
            cls: Any = component.get(group, kind)
            package, _, file = cls.__module__.rpartition(".")
            if package == component.PACKAGES[group] and not file.startswith("_"):
                digest = code.digest(provenance.roots_of(cls), without=shared)
                pins[f"{group} {kind}"] = {"version": cls.version, "code": digest}
    return pins


def changed(pinned: Pins, now: Pins) -> list[str]:
    """Names of what has other code under the same version, or a lower version."""
    return [
        name
        for name in pinned.keys() & now.keys()
        if now[name]["version"] < pinned[name]["version"]
        or (now[name]["version"] == pinned[name]["version"] and now[name]["code"] != pinned[name]["code"])
    ]


def refusal(name: str, pinned: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is wrong with one name, and what to do."""
    group, _, kind = name.partition(" ")
    where = f"versions.STAGES[{kind!r}]" if group == "stage" else f"version= of @component in {group} {kind}"
    if now["version"] < pinned["version"]:
        return f"{name}: its version went back from {pinned['version']} to {now['version']}; versions only rise"
    return (
        f"{name}: its code changed and its version is still {now['version']}. If numbers change, raise {where}, then "
        'run `python scripts/pin_code.py`; if they provably do not, `python scripts/pin_code.py --same-numbers "why"`'
    )


def updated(pinned: Pins, now: Pins, reason: str | None) -> Pins:
    """The pins to write; SystemExit with every refusal. reason: why the numbers are the same where code changed."""
    bad = sorted(changed(pinned, now))
    lower = [name for name in bad if now[name]["version"] < pinned[name]["version"]]
    if refused := lower if reason else bad:
        raise SystemExit("\n".join(refusal(name, pinned[name], now[name]) for name in refused))
    pins: Pins = {}
    for name, pin in sorted(now.items()):
        before = pinned.get(name, {})
        reasons = before.get("same_numbers", []) if before.get("version") == pin["version"] else []
        pins[name] = {**pin, **({"same_numbers": reasons} if reasons else {})}
        if name in bad:
            pins[name]["same_numbers"] = [*reasons, reason]
    return pins


def main(argv: list[str]) -> int:
    """Write the file, or exit with what is in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--same-numbers", metavar="WHY", help="why code that changed leaves all numbers as they were")
    reason = parser.parse_args(argv).same_numbers
    if reason is not None and not reason.strip():
        parser.error("--same-numbers needs a reason")
    pinned = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    pins = updated(pinned, current(), reason)
    FILE.write_text(json.dumps(pins, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(pins)} pins, {sum(pins[name] != pinned.get(name) for name in pins)} new or changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
