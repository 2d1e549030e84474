"""What AdviceBench prints: a line per run, the trace of a run that was not served, and the tables."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.advice.configurations import HEALTHY
from benchmarks.advice.score import BASE, GUARD, PEERS


def line(found: dict[str, Any]) -> str:
    """Sum a study up in a line."""
    (a, b), (a0, b0) = found["rates"], found["base rates"]
    parts = [f"{found['name']:44s} seed {found['seed']:2d} {found['seconds']:4.0f} s"]
    parts.append(f"alpha {a:g} ({a0:g}) beta {b:g} ({b0:g}) left {found['left']} peak {found['peak']}")
    parts.append(f"final {found['final'] / found['best']:.3g}x")
    parts += [f"{found['dead']:.0%} dead"] if found["dead"] else []
    broken = found["cause"] != HEALTHY
    if broken == found["trains"]:
        parts.append("NOT BROKEN" if broken else "NOT HEALTHY")
    if "advice" in found:
        advice = found["advice"]
        said = "no advice"
        if advice is not None:
            rates = ("alpha", "beta", "gradient_clip_val")
            said = f"{advice['cause']}@{advice['step']} " + " ".join(
                f"{rate}={advice[rate]:.3g}" for rate in rates if advice[rate] is not None
            )
        parts.append(f"| {said}")
        if broken:
            marks = [
                f"{name} {'yes' if found[key] else 'NO'}" for name, key in (("right", "right"), ("ahead", "ahead"))
            ]
            parts.append(f"{' '.join(marks)} second {found['second'] / found['best']:.3g}x")
        elif not found["unchanged"]:
            parts.append("CHANGED BY THE GUARD")
    if "peers" in found:
        parts.append("| " + " ".join("+" if found["peers"][peer]["trains"] else "-" for peer in PEERS[:-1]))
    return "  ".join(parts)


def trace(found: dict[str, Any]) -> str:
    """Show what the guard said and saw in a broken run that its advice did not serve, or in a healthy one it judged."""
    healthy = found["cause"] == HEALTHY
    if "advice" not in found or (found["advice"] is None if healthy else found["second trains"] and found["right"]):
        return ""
    lines = [f"      after {step} steps: {' '.join(text.split())}" for step, text in found["messages"][:1]]
    for check in found["checks"]:
        numbers = " ".join(f"{name} {check[name]:.3g}" for name in ("alpha", "alpha_c", "beta", "beta_c", "severity"))
        lines.append(f"      check {check['step']}: {check['status']} {numbers} {' '.join(check['findings'])}")
    return "".join(f"{each}\n" for each in lines)


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\nAdviceBench, set '{result['set']}', seeds {result['seeds']}: {result['broken']} broken runs, ", end="")
    print(f"{result['healthy']} healthy; {result['minutes']:.1f} minutes")
    print(
        f"\n{'':26s} runs   cause  in time  lead  none  trains  learns |   base finder halved   clip\n"
        f"  {'all':24s}{_row(result['all'])}"
    )
    for title in ("by cause", "by family", "by optimizer"):
        print(title, *(f"  {name:24s}{_row(each)}" for name, each in result[title].items()), sep="\n")
    print(f"EarlyStopping's message names no rate: its second run is the first one, {0.0:.0%}")
    rate = result["false advice per 1000 steps"]
    if rate is not None:
        print(
            f"\nfalse advice: {len(result['false advice'])} in {result['healthy steps']} healthy steps, {rate:.2f} per 1000"
        )
        print("".join(f"   {each}\n" for each in result["false advice"]), end="")
        print(f"healthy runs changed by the guard: {result['changed by the guard'] or 'none'}")
    print("\nnot scored:" + "".join(f"\n   {each}" for each in result["not scored"]))
    print("\nnot served:" + "".join(f"\n   {each}" for each in result["failures"]))


def _row(each: dict[str, Any]) -> str:
    if not each:
        return ""
    text = f"{each['runs']:5d}"
    if "right" not in each:
        text += " " * 44
    else:
        lead = math.nan if each["lead"] is None else each["lead"]
        text += f" {each['right']:7.1%} {each['ahead']:8.1%} {lead:5.0f} {each['no advice']:5d} {each[GUARD]:7.1%} {each['learns']:7.1%}"
    text += f" | {each[BASE]:6.1%}"
    if PEERS[0] in each:
        text += " " + " ".join(f"{each[peer]:6.1%}" for peer in PEERS[:-1])
    return text
