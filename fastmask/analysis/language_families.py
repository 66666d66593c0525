"""The families of languages, by the codes of Universal Dependencies; Indo-European by its branches.

Grouped as in the list of treebanks at universaldependencies.org. For colours and for tests of "related languages share
more"; pass a mapping of your own where another grouping is meant.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterable, Mapping

from fastmask.tasks.data.synthetic_languages import LANGUAGES as ARTIFICIAL

__all__ = ["LANGUAGE_FAMILIES", "UNKNOWN_FAMILY", "families_of", "family_colour"]

UNKNOWN_FAMILY = "other"
LIGHTNESS = 0.45

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


def families_of(languages: Iterable[str], families: Mapping[str, str] | None = None) -> dict[str, str]:
    """The family of each language: from `families` where given, else from the table, else "other"."""
    chosen = LANGUAGE_FAMILIES if families is None else families
    return {language: chosen.get(language, UNKNOWN_FAMILY) for language in languages}


def family_colour(family: str, other: str) -> str:
    """The colour of a family, the same everywhere.

    Hues are golden angles apart in the order of the table, so families that follow each other differ most. All have
    the same lightness, which stands out from white and from black alike.

    Args:
        family: any name; those that are not in the table get a hue by their name.
        other: the colour of languages whose family is not known.
    """
    if family == UNKNOWN_FAMILY:
        return other
    known = list(dict.fromkeys(LANGUAGE_FAMILIES.values()))
    place = known.index(family) if family in known else zlib.crc32(family.encode())
    hue = (0.58 + place * 0.618034) % 1
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, LIGHTNESS, 0.62))
