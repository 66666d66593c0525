"""What the pictures share: figures without a display, colours that colour-blind readers can tell apart, labels.

Categories take the palette of Okabe and Ito (2008) and a marker each; amounts take matplotlib's "cividis", and signed
amounts "PuOr", both made for readers with a colour vision deficiency. A language has the colour of its family.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fastmask.tasks.data.synthetic_languages import LANGUAGES as ARTIFICIAL

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#777777"
ON_LIGHT = "#101010"
SIGNED = "PuOr"

WRITTEN = 14  # rows and columns up to which numbers fit into the cells of a heatmap

# ---- languages

UNKNOWN_FAMILY = "other"
_CODES = {
    "Germanic": "af ang bar da de en fo fy got gsw is lb nb nds nl nn no non sv yi",
    "Romance": "ca co es fr frm fro gl it lad lij lld nap oc pro pt rm ro sc scn",
    "Italic, other": "la xum",
    "Slavic": "be bg cs cu dsb hr hsb mk orv pl qpm ru sk sl sr uk",
    "Baltic": "ltg lt lv",
    "Celtic": "br cy ga gd gv mga pgl sga",
    "Greek": "cpg el grc pnt",
    "Armenian": "axm hy hyw xcl",
    "Albanian": "aln sq",
    "Anatolian": "hit",
    "Indo-Aryan": "as bho bn gu hi ks mr ne or pa pi pra sa sd si ur xnr",
    "Iranian": "ckb fa glk kfm kmr nyq os pal ps sdh soj zza",
    "Uralic": "et fi hu kca koi kpv krl mdf mns myv olo sme sms udm vep vro yrk",
    "Turkic": "az ba cv kk ky ota otk sah tk tr tt ug uz",
    "Mongolic": "bxr mn xal",
    "Tungusic": "eve gld mnc neg sjo",
    "Semitic": "aeb aii ajp akk am apc ar gez hbo he mt ti",
    "Afro-Asiatic, other": "bej cop egy ha kab say so",
    "Dravidian": "brh kn ml ta te",
    "Sino-Tibetan": "bo ctn lus lzh my wuu yue zh",
    "Japonic": "ja ojp",
    "Koreanic": "ko okm",
    "Austroasiatic": "km pbv vi",
    "Tai-Kadai": "lo th",
    "Austronesian": "ceb gor hil id jv mg ms tdt tl",
    "Niger-Congo": "bm gya sw tn wo xh yo zu",
    "Nilo-Saharan": "laj",
    "Kartvelian": "ka lzz xmf",
    "Northwest Caucasian": "ab abq",
    "Northeast Caucasian": "ce dar lez",
    "Tupian": "aqz arr eme gn gub gun mpu myu sru tpn urb yrl",
    "Uto-Aztecan": "azz nci nhi",
    "Chukotko-Kamchatkan": "ckt",
    "Eskimo-Aleut": "ess kl",
    "Basque": "eu",
}

LANGUAGE_FAMILIES: dict[str, str] = {
    **{code: family for family, codes in _CODES.items() for code in codes.split()},
    **{language.code: language.family for language in ARTIFICIAL.values()},
}
"""By the codes of Universal Dependencies, grouped as its list of treebanks is; Indo-European by its branches."""


def families_of(languages: Iterable[str], families: Mapping[str, str] | None = None) -> dict[str, str]:
    """The family of each language: from `families` where given, else from the table, else "other"."""
    chosen = LANGUAGE_FAMILIES if families is None else families
    return {language: chosen.get(language, UNKNOWN_FAMILY) for language in languages}


def family_colour(family: str, other: str) -> str:
    """The colour of a family, the same everywhere.

    Hues are golden angles apart in the order of the table, so families that follow each other differ most. All have
    the same lightness, which stands out from white and from black alike. Families that are not in the table get a hue
    by their name, and languages whose family is not known the colour `other`.
    """
    if family == UNKNOWN_FAMILY:
        return other
    known = list(dict.fromkeys(LANGUAGE_FAMILIES.values()))
    place = known.index(family) if family in known else zlib.crc32(family.encode())
    hue = (0.58 + place * 0.618034) % 1
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.45, 0.62))


def language_colour(language: str, other: str, families: Mapping[str, str] | None = None) -> str:
    """The colour of a language's family; `other` if that is not known."""
    return family_colour(families_of([language], families)[language], other)


def colour_languages(axis: Any, families: Mapping[str, str] | None = None) -> None:
    """Give the languages among the names at a matplotlib axis the colour of their family."""
    for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
        label.set_color(language_colour(label.get_text(), "#000000", families))


# ---- figures


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of so many inches, laid out so that texts do not run into each other."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


def bare(*axes: Any) -> None:
    """Take the frame above and to the right away."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def legend_above(axis: Any, ncols: int = 2) -> None:
    """A legend that lies on nothing that is drawn."""
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=ncols, fontsize=8, frameon=False)


def heatmap(
    axis: Any,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str = "cividis",
    low: float,
    high: float,
    numbers: str | None = "{:.2f}",
    written: int = WRITTEN,
) -> Any:
    """Draw a matrix [rows, columns] with its names, languages in the colour of their family; NaN stays empty.

    Names of columns are upright where they would run into each other; `numbers` says how to write the value into each
    cell, where there are at most `written` rows and columns (None: not at all).

    Returns:
        The image, for a colour bar.
    """
    values = np.asarray(values, dtype=float)
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(rows)), rows)
    upright = len(columns) > written or max(map(len, columns), default=0) > 4
    axis.set_xticks(range(len(columns)), columns, rotation=90 if upright else 0)
    axis.tick_params(length=0)
    colour_languages(axis)
    if numbers is not None and max(values.shape) <= written:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                colour = ON_LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
                axis.text(column, row, numbers.format(value), ha="center", va="center", fontsize=8, color=colour)
    return image
