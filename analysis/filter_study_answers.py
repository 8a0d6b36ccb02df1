"""What the rows of `filter_study` say: subjects with their points, fronts, fits, and the answer in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cce_precision.analysis.bench_job import PRODUCT
from cce_precision.analysis.convergence_page import number
from cce_precision.analysis.filter_study import ROOM_MB, SUBJECT, Row

__all__ = [
    "DEFAULTS",
    "SIDES",
    "Fit",
    "Group",
    "Point",
    "Tried",
    "cheapest",
    "crowded",
    "drawn",
    "family",
    "fit",
    "groups_of",
    "pair",
    "sentences",
]

SIDES = ("dE", "dC")
NAMES = {
    "real": "real head",
    "captured": "shipped head",
    "trained": "synthetic, trained",
    "init": "synthetic, flat",
}
DEFAULTS = ("cce@2^-12", "cce_sparse@2^-12", "cce_unbiased@2^-12", "cce_subsampled@2^-12/8", "cce_exact", "baseline")
SHIPPED = ("captured", "trained")
TILES, DROP, SAMPLE = "cce@2^-12", "cce_sparse@2^-12", "cce_unbiased@2^-12"
ORDER = 2.0**-10  # by how much the order of fp32 sums moves an error in bf16
SAME = 0.02  # errors of estimators that differ by less are alike: so far do their draws scatter
CLOSE = 5e-3  # the tolerance of a sentence
FULL = 0.95  # a tile filter that keeps such a share of the entries drops nothing worth the name


class Fit(NamedTuple):
    """error^2 = noise^2 / draws + stays^2, and the slope of log error over log draws."""

    noise: float
    stays: float
    slope: float


def fit(draws: Sequence[float], errors: Sequence[float]) -> Fit:
    """Least squares of the relative misfit of the squared errors, `stays` and `noise` at least 0."""
    if len(draws) < 2:
        return Fit(math.nan, math.nan, math.nan)
    a = [1 / k / e**2 for k, e in zip(draws, errors)]
    b = [1 / e**2 for e in errors]
    aa, ab, bb = (sum(x * y for x, y in zip(*pair)) for pair in ((a, a), (a, b), (b, b)))
    sa, sb = sum(a), sum(b)
    determinant = aa * bb - ab * ab
    noise, stays = (
        ((sa * bb - sb * ab) / determinant, (sb * aa - sa * ab) / determinant) if determinant else (0.0, sb / bb)
    )
    if stays < 0:
        noise, stays = sa / aa, 0.0
    elif noise < 0:
        noise, stays = 0.0, sb / bb
    x, y = [math.log(k) for k in draws], [math.log(e) for e in errors]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((p - mx) * (q - my) for p, q in zip(x, y)) / sum((p - mx) ** 2 for p in x)
    return Fit(math.sqrt(noise), math.sqrt(stays), slope)


def family(method: str) -> str:
    """The variant that a method is of, with its workspace where it has one of its own."""
    base, _, size = method.rpartition("@") if method.endswith("MB") else (method, "", "")
    return base.partition("@")[0] + (f"@{size}" if size else "")


@dataclass(frozen=True)
class Point:
    """A method of one step: what it costs (products of time, else entries a row) and its errors."""

    method: str
    cost: float
    errors: tuple[float, float]
    ms: float | None = None
    mib: float | None = None

    def error(self, side: str) -> float:
        return self.errors[SIDES.index(side)]


@dataclass
class Group:
    """The rows of one subject."""

    about: Row
    head: Row = field(default_factory=dict)
    steps: dict[str, Row] = field(default_factory=dict)
    times: dict[str, Row] = field(default_factory=dict)
    averages: dict[str, Row] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        return str(self.about["dtype"])

    @property
    def short(self) -> str:
        case, stage = str(self.about["case"]), self.about["stage"]
        return NAMES.get(case, case) + (f", {stage}" if stage else "")

    @property
    def title(self) -> str:
        a = self.about
        device = a["device"].partition(" (")[0]
        return f"{self.short} (N={a['n']:,}, V={a['v']:,}, D={a['d']:,}, {a['dtype']}, {device})"

    @property
    def slug(self) -> str:
        a = self.about
        device = "cpu" if a["device"].startswith("CPU") else "gpu"
        return "-".join(str(x) for x in (a["case"], a["stage"], a["v"], a["dtype"], device) if x)

    @property
    def timed(self) -> bool:
        return any(row["status"] == "ok" and row["rounds"] for row in self.times.values())

    @property
    def cost_name(self) -> str:
        return "time / logits product" if self.timed else "entries a row that enter dE"

    def said(self, cost: float, short: bool = False) -> str:
        if self.timed:
            return f"{cost:.2f} G" if short else f"{cost:.2f} products"
        return f"{cost:,.0f} of {self.about['v']:,}" if short else f"{cost:,.0f} of {self.about['v']:,} entries a row"

    def named(self, point: Point) -> str:
        """A method and its cost; no method where all but a few entries are computed."""
        if not self.timed and point.cost >= FULL * self.about["v"]:
            return "dense"
        return f"{point.method}, {self.said(point.cost, short=True)}"

    @property
    def floor(self) -> dict[str, float]:
        return {side: self.head.get(f"floor_{side}", math.nan) for side in SIDES}

    @property
    def points(self) -> list[Point]:
        """What was measured of a step; where there are times, of methods whose check passed, errors of those calls."""
        if not self.timed:
            return [Point(m, row["entries"], (row["dE"], row["dC"])) for m, row in self.steps.items()]
        return [
            Point(m, t["times_product"], (t["dE_error"], t["dC_error"]), t["time_ms"], t["peak_mib"])
            for m, t in self.times.items()
            if m in self.steps and t["status"] == "ok" and t["rounds"]
        ]

    def front(self, side: str) -> set[str]:
        """Methods than which no other is as cheap and as exact, and one of the two more so."""

        def beats(a: Point, b: Point) -> bool:
            no_worse = a.cost <= b.cost and a.error(side) <= b.error(side)
            return no_worse and (a.cost < b.cost or a.error(side) < b.error(side))

        points = self.points
        return {p.method for p in points if not any(beats(other, p) for other in points)}


def cheapest(group: Group, limit: float) -> Point | None:
    """The cheapest method with both errors within the limit, of equals the more exact; None for none."""
    able = [p for p in group.points if max(p.errors) <= limit]
    return min(able, key=lambda p: (p.cost, max(p.errors)), default=None)


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """The subjects, timed ones first."""
    found: dict[tuple[Any, ...], Group] = {}
    for row in rows:
        group = found.setdefault(tuple(row[k] for k in SUBJECT), Group({k: row[k] for k in SUBJECT}))
        if "failed" in row:
            group.failures.append(f"{row['what']} {row['unit']}: {row['failed']}")
        elif row["what"] == "head":
            group.head = row
        elif row["what"] != "estimator":
            {"step": group.steps, "time": group.times, "average": group.averages}[row["what"]][row["method"]] = row
    for group in found.values():
        bad = [t for m, t in group.times.items() if m != PRODUCT and t["status"] != "ok"]
        group.failures += [f"{t['method']}: no time, {t['status']}, {t['reason']}" for t in bad]
    some = [group for group in found.values() if group.steps]
    return sorted(some, key=lambda group: not group.timed)


@dataclass(frozen=True)
class Tried:
    """An estimator on a head at a share, beside the variant's own of its group."""

    name: str
    stage: str  # of the shipped head, or of which case
    share: int
    group: str
    of_variant: str
    unbiased: bool
    entries: float
    errors: dict[str, float]
    own: dict[str, float]  # of what the variant of the group does

    def ratio(self, side: str) -> float:
        return self.errors[side] / self.own[side]


def tried_of(rows: Iterable[Row]) -> list[Tried]:
    """The estimators' rows, each with the errors of what the unbiased variant of its group does."""
    some = [
        row | {"stage": row["stage"] or f"synthetic, {row['case']}"}
        for row in rows
        if row["what"] == "estimator" and "failed" not in row
    ]
    at = lambda row: (row["stage"], row["share"], row["group"])  # noqa: E731
    own = {at(row): {side: row[side] for side in SIDES} for row in some if row["of_variant"] and row["unbiased"]}
    return [
        Tried(
            name=row["method"],
            errors={side: row[side] for side in SIDES},
            own=own[at(row)],
            **{k: row[k] for k in ("stage", "share", "group", "of_variant", "unbiased", "entries")},
        )
        for row in some
        if at(row) in own
    ]


# -- the answer --------------------------------------------------------------------------------------------------------


def times(ratio: float, more: str = "more", less: str = "less") -> str:
    """4.2 times less, 1.3 times more."""
    return f"{ratio:.1f} times {more}" if ratio > 1 else f"{1 / ratio:.1f} times {less}"


def crowded(group: Group, method: str) -> bool:
    """Whether a filter's entries did not fit its lists, so that its gradients are those of cce_exact but for the order
    of their sums.
    """
    exact, step = group.steps.get("cce_exact"), group.steps[method]
    return group.timed and exact is not None and _alike([step[side] for side in SIDES], [exact[side] for side in SIDES])


def _alike(errors: Sequence[float], exact: Sequence[float]) -> bool:
    return all(abs(a / b - 1) < ORDER for a, b in zip(errors, exact))


def drawn(group: Group) -> dict[str, Row]:
    """The averages of methods that drew anything: where the entries did not fit, they are those of cce_exact."""
    exact = group.steps.get("cce_exact")
    if exact is None:
        return group.averages
    first = [exact[side] for side in SIDES]
    return {m: row for m, row in group.averages.items() if not _alike([row[side][0] for side in SIDES], first)}


def pair(group: Group) -> tuple[str, str] | None:
    """The drop and the sample at 2^-12 whose entries fit, if need be in the larger workspace."""
    for names in ((DROP, SAMPLE), (f"{DROP}@{ROOM_MB}MB", f"{SAMPLE}@{ROOM_MB}MB")):
        if set(names) <= set(group.steps) and not any(crowded(group, name) for name in names):
            return names
    return None


def _of_crowd(group: Group, name: str) -> str | None:
    if not crowded(group, DROP):
        return None
    costs = {p.method: p.cost for p in group.points}
    said = f"{name}: what may lie above 2^-12 does not fit the lists of {DROP}, the device takes the exact way"
    if group.timed and {DROP, SAMPLE, "cce_exact"} <= set(costs):
        said += (
            f", and with the attempt a step costs {costs[DROP]:.2f} times the logits product ({SAMPLE} "
            f"{costs[SAMPLE]:.2f}, cce_exact {costs['cce_exact']:.2f})"
        )
    return said + "."


def _of_bias(group: Group, name: str) -> str | None:
    names = pair(group)
    if names is None:
        return None
    drop, sample = (group.steps[m] for m in names)
    room = f", with {ROOM_MB} MB of workspace" if names[0] != DROP else ""
    said = (
        f"{name}{room}: entries below 2^-12, dropped one by one, leave an error of {number(drop['dE'])} in dE and "
        f"{number(drop['dC'])} in dC; sampled without bias {number(sample['dE'])} and {number(sample['dC'])}, "
        f"{times(sample['dE'] / drop['dE'])} and {times(sample['dC'] / drop['dC'])}, from {sample['entries']:,.0f} "
        f"instead of {drop['entries']:,.0f} of {group.about['v']:,} entries a row"
    )
    drops = [row for m, row in group.steps.items() if family(m) == family(names[0]) and not crowded(group, m)]
    larger = [row for row in drops if sample["entries"] <= row["entries"] < FULL * group.about["v"]]
    if larger:
        fair = min(larger, key=lambda row: row["entries"])
        said += (
            f" (dropping with {fair['entries']:,.0f}, at {fair['method'].split('@')[1]}, leaves "
            f"{number(fair['dE'])} and {number(fair['dC'])})"
        )
    costs = {p.method: p.cost for p in group.points}
    if group.timed and set(names) <= set(costs):
        said += f", in {costs[names[1]]:.2f} instead of {costs[names[0]]:.2f} times the logits product"
    return said + "."


def _of_tiles(groups: Sequence[Group]) -> str | None:
    kept = [(g, g.steps[TILES]["entries"] / g.about["v"]) for g in groups if TILES in g.steps]
    whole = [f"{g.short} ({share:.0%} of the entries are kept)" for g, share in kept if share >= FULL]
    if not whole:
        return None
    return (
        f"Hardly a tile lies below 2^-12 in {'; '.join(whole)}: there the error of cce is hardly that of its filter, "
        "but of its sums in the input dtype."
    )


def _of_averages(groups: Sequence[Group]) -> str | None:
    some = [g for g in groups if SAMPLE in drawn(g) and DROP in g.steps]
    if not some:
        return None
    exact = [g for g in some if g.dtype == "fp32"] or some
    group = exact[0]
    row = group.averages[SAMPLE]
    falls = [
        f"from {number(row[s][0])} to {number(row[s][-1])} in {s} (slope {fit(row['draws'], row[s]).slope:.2f})"
        for s in SIDES
    ]
    stays = " and ".join(number(group.steps[DROP][side]) for side in SIDES)
    return (
        f"Averaged over {row['draws'][-1]} draws ({group.short}, {group.dtype}), the error of {SAMPLE} falls "
        f"{' and '.join(falls)}; pure noise has slope -0.5. What {DROP} leaves, {stays}, is the same for every draw."
    )


def _of_rows(groups: Sequence[Group]) -> list[str]:
    """Of words that are no target: the first subject, and those where sampling leaves a larger error than dropping."""
    said: list[str] = []
    for group in groups:
        names = pair(group)
        drop, sample = (group.steps[m]["strata"].get("0") for m in names) if names else (None, None)
        if drop and sample and (not said or sample["error"] > drop["error"]):
            said.append(
                f"Words that are no target in the batch ({drop['rows']:,} rows of dC, {group.short}): dropping leaves "
                f"{drop['empty']:.0%} of their rows empty and an error of {number(drop['error'])}, sampling "
                f"{sample['empty']:.0%} and {number(sample['error'])}."
            )
    return said


def _of_fronts(groups: Sequence[Group]) -> list[str]:
    said = []
    for timed in (True, False):
        best = [(g, cheapest(g, CLOSE)) for g in groups if g.timed == timed and g.dtype != "fp32"]
        found = [f"{g.short}: {g.named(p)}" for g, p in best if p is not None]
        if found:
            word = "Fastest" if timed else "Fewest entries (not times)"
            said.append(f"{word} with both gradients within {number(CLOSE)}: {'; '.join(found)}.")
    return said


def _of_estimators(tried: Sequence[Tried]) -> list[str]:
    """Which of those that no variant does are better wherever they were tried, on some heads, or nowhere."""
    kinds: dict[str, list[str]] = {"better": [], "mixed": [], "no better": []}
    for name in dict.fromkeys(t.name for t in tried if not t.of_variant):
        ratios = {s: [t.ratio(s) for t in tried if t.name == name] for s in SIDES}
        span = ", ".join(f"{s} {min(x):.2f} to {max(x):.2f}" for s, x in ratios.items())
        low, high = min(map(min, ratios.values())), max(map(max, ratios.values()))
        kind = "no better" if low > 1 - SAME else "better" if high < 1 + SAME else "mixed"
        kinds[kind].append(f"{name} ({span})")
    words = {
        "better": f"nowhere worse (by more than {SAME:.0%}), better somewhere",
        "mixed": "better on some heads, worse on others",
        "no better": "no better anywhere",
    }
    found = [f"{words[kind]}: {', '.join(names)}" for kind, names in kinds.items() if names]
    return [f"Other estimators, errors over the variants' own at as many entries: {'; '.join(found)}."] if found else []


def _of_subsets(tried: Sequence[Tried]) -> list[str]:
    """Subsets beside single entries, where both cost as many entries."""
    own = {(t.group, t.stage, t.share): t.own for t in tried}
    ratios: dict[str, dict[str, list[float]]] = {}
    for (group, stage, share), errors in own.items():
        if group == "subsets" and (single := own.get(("entries", stage, share))):
            for side in SIDES:
                ratios.setdefault(stage, {}).setdefault(side, []).append(errors[side] / single[side])
    spans = [
        f"{stage} {', '.join(f'{s} {min(x):.1f} to {max(x):.1f} times' for s, x in sides.items())}"
        for stage, sides in ratios.items()
    ]
    return [f"Errors of subsets over those of single entries, at as many: {'; '.join(spans)}."] if spans else []


def _of_the_mean_tail(tried: Sequence[Tried]) -> list[str]:
    """What it helps a drop to put the mean tail back."""
    drops = {(t.stage, t.share): t for t in tried if not t.unbiased and t.of_variant}
    back = [t for t in tried if not t.unbiased and not t.of_variant]
    pairs = [(drops[t.stage, t.share], t) for t in back if (t.stage, t.share) in drops]
    if not pairs:
        return []
    gains = {s: [drop.errors[s] / t.errors[s] for drop, t in pairs] for s in SIDES}
    span = " and ".join(f"{s} {min(x):.1f} to {max(x):.1f}" for s, x in gains.items())
    return [
        f"The mean tail, put back where entries are dropped, divides a drop's error by {span}; the rest stays biased."
    ]


def sentences(groups: Sequence[Group], tried: Sequence[Tried]) -> list[str]:
    """The answer in words, from the rows alone."""
    half = [g for g in groups if g.dtype != "fp32" and {DROP, SAMPLE} <= set(g.steps)]
    timed = [g for g in half if g.timed]
    first = [g for g in half if g.timed or not timed or (g.about["case"], g.about["stage"]) == SHIPPED]
    said: list[str | None] = []
    for i, group in enumerate(first):
        name = group.title if i == 0 or group.timed != first[i - 1].timed else group.short
        said += [_of_crowd(group, name), _of_bias(group, name)]
    said += [_of_tiles(first), _of_averages(groups), *_of_rows(first), *_of_fronts(groups)]
    said += [*_of_subsets(tried), *_of_estimators(tried), *_of_the_mean_tail(tried)]
    return [s[0].upper() + s[1:] for s in said if s]
