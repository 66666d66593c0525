"""Joins scores and measured speed: writes curve.csv and draws curve.png, both beside this file.

    python docs/results/3-density/curve.py

``speed.csv`` was measured on a machine that did nothing else, by::

    python -m benchmarks encoder --shape minilm --layers 4 --unit both,heads --density 0.85,0.7,0.5,0.35,0.25 \
        --present 8,1 --batch 32 --tokens 36 --dtype bfloat16 --implementations fastmask --parts forward+backward \
        --seconds 3 --csv speed.csv
"""

from pathlib import Path

import pandas as pd

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, new_figure

HERE = Path(__file__).parent
METHODS = ("static", "shared", "random")
UNITS = {"heads": "heads", "both": "heads and neurons"}


def scores() -> pd.DataFrame:
    """Mean LAS of each arm, seen and adapted, over languages and seeds."""
    rows = pd.read_csv(HERE / "results.csv")
    rows = rows[rows["condition"].isin(["seen", "adapted"])]
    by_seed = (
        rows.groupby(["arm", "condition", "seed", "language"])["score"].mean().groupby(["arm", "condition", "seed"])
    )
    table = by_seed.mean().groupby(["arm", "condition"]).mean().unstack("condition")
    return table.assign(seeds=rows.groupby("arm")["seed"].nunique())


def speeds() -> pd.DataFrame:
    """Speed of a forward and backward pass over PyTorch's dense network, and activations kept over our full network.

    Our layers keep less than PyTorch's even without masks, which is not what masks save.
    """
    rows = pd.read_csv(HERE / "speed.csv")
    key = ["unit", "density", "present"]
    kept = rows.pivot_table(index=key, columns="implementation", values="kept_mib")
    own = rows[rows["implementation"] == "fastmask"].set_index(key)
    return pd.DataFrame({"speed": own["over_dense"], "memory": kept["fastmask"] / kept["full"]}).unstack("present")


def joined() -> pd.DataFrame:
    """One row for each kind of units, density and method."""
    of, fast = scores(), speeds()
    rows = [
        {"units": "", "density": 1.0, "method": "full", **of.loc["full"], "speed_1": 1.0, "speed_8": 1.0, "memory": 1.0}
    ]
    for arm in of.index:
        method, _, rest = arm.partition("-")
        if method in METHODS:
            unit, _, percent = rest.partition("-")
            found = fast.loc[unit, int(percent) / 100]
            # Languages that share a mask are multiplied as one, whatever their number.
            present = {1: 1, 8: 1 if method == "shared" else 8}
            measured = {f"speed_{n}": found["speed", of_n] for n, of_n in present.items()}
            measured["memory"] = found["memory", present[8]]
            rows.append({"units": unit, "density": int(percent) / 100, "method": method, **of.loc[arm], **measured})
    table = pd.DataFrame(rows).sort_values(["units", "density", "method"], ascending=[True, False, False])
    full = table[table["method"] == "full"].iloc[0]
    for condition in ("seen", "adapted"):
        table[f"{condition}_over_full"] = table[condition] - full[condition]
    return table


def draw(table: pd.DataFrame) -> None:
    """Loss of LAS against speed, one panel for each condition."""
    figure = new_figure(9.5, 4.0)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, condition in zip(panels, ("seen", "adapted"), strict=True):
        for unit, dashes in zip(UNITS, ("-", "--"), strict=True):
            for method, colour, marker in zip(METHODS, COLOURS, MARKERS, strict=False):
                own = table[(table["units"] == unit) & (table["method"] == method)].sort_values("density")
                if own.empty:  # not run yet
                    continue
                label = f"{method}, {UNITS[unit]}"
                panel.plot(
                    own["speed_8"], own[f"{condition}_over_full"], dashes, color=colour, marker=marker, label=label
                )
        for least in (-0.5, -1.0):
            panel.axhline(least, color=GREY, linewidth=0.8)
        panel.set_title({"seen": "training languages", "adapted": "unseen languages, adapted"}[condition])
        panel.set_xlabel("forward and backward pass, times as fast as dense")
    panels[0].set_ylabel("LAS over the full network")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(HERE / "curve.png", dpi=110)


if __name__ == "__main__":
    found = joined()
    found.round(2).to_csv(HERE / "curve.csv", index=False, float_format="%.2f")
    draw(found)
    print(found.round(2).to_string(index=False))
