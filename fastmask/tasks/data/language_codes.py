"""Language codes of Universal Dependencies by the language part of a treebank's folder name.

Needed for files without an official name (``en_ewt-ud-train.conllu``), whose prefix is the code, and where somebody
writes ``English`` or ``EN`` for ``en``. Both written standards of Norwegian share the code ``no``, as in the official
files. Earlier names of renamed languages are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TABLE = """
Abaza=abq Abkhaz=ab Afrikaans=af Akkadian=akk Akuntsu=aqz Albanian=sq Alemannic=gsw Amharic=am Ancient_Greek=grc
Ancient_Hebrew=hbo Apurina=apu Arabic=ar Armenian=hy Assamese=as Assyrian=aii Azerbaijani=az Bambara=bm Basque=eu
Bavarian=bar Beja=bej Belarusian=be Bengali=bn Bhojpuri=bho Bokota=sab Bororo=bor Brahui=brh Breton=br Bribri=bzd
Bulgarian=bg Buryat=bxr Cantonese=yue Cappadocian=cpg Catalan=ca Cebuano=ceb Central_Kurdish=ckb Chechen=ce Chinese=zh
Chintang=ctn Chukchi=ckt Chuvash=cv Classical_Armenian=xcl Classical_Chinese=lzh Classical_Nahuatl=nci Coptic=cop
Corsican=co Croatian=hr Czech=cs Danish=da Dargwa=dar Dutch=nl Egyptian=egy English=en Erzya=myv Esperanto=eo
Estonian=et Even=eve Evenki=evn Faroese=fo Finnish=fi French=fr Frisian_Dutch=qfn Galician=gl Georgian=ka German=de
Gheg=aln Gilaki=glk Gorontalo=gor Gothic=got Greek=el Guajajara=gub Guarani=gn Gujarati=gu Gwichin=gwi
Haitian_Creole=ht Hausa=ha Hebrew=he Highland_Puebla_Nahuatl=azz Hiligaynon=hil Hindi=hi Hindi_English=qhe Hittite=hit
Hungarian=hu Icelandic=is Ika=arh Indonesian=id Irish=ga Italian=it Japanese=ja Javanese=jv Kaapor=urb Kabyle=kab
Kadiweu=kbc Kalmyk=xal Kangri=xnr Kannada=kn Karelian=krl Karo=arr Kashmiri=ks Kazakh=kk Khoekhoe=naq Khunsari=kfm
Kiche=quc Komi_Permyak=koi Komi_Zyrian=kpv Korean=ko Kurmanji=kmr Kyrgyz=ky Ladin=lld Ladino=lad Lango=laj
Latgalian=ltg Latin=la Latvian=lv Laz=lzz Lezgian=lez Ligurian=lij Lithuanian=lt Livvi=olo Low_Saxon=nds
Luxembourgish=lb Macedonian=mk Madi=jaa Maghrebi_Arabic_French=qaf Makurap=mpu Malagasy=mg Malayalam=ml Maltese=mt
Manchu=mnc Mansi=mns Manx=gv Marathi=mr Mbya_Guarani=gun Middle_Armenian=axm Middle_French=frm Middle_Irish=mga
Middle_Persian=pal Mingrelian=xmf Mizo=lus Moksha=mdf Mongolian=mn Munduruku=myu Naija=pcm Nanai=gld Nayini=nyq
Neapolitan=nap Negidal=neg Nenets=yrk Nepali=ne Nheengatu=yrl North_Sami=sme Northwest_Gbaya=gya Norwegian=no
Occitan=oc Odia=or Old_Church_Slavonic=cu Old_East_Slavic=orv Old_English=ang Old_French=fro Old_Irish=sga
Old_Japanese=ojp Old_Occitan=pro Old_Provencal=pro Old_Russian=orv Old_Turkish=otk Ottoman_Turkish=ota
Paiter_Surui=sru Pali=pi Papiamento=pap Pashto=ps Paumari=pad Persian=fa Pesh=pay Phrygian=xpg Pnar=pbv Polish=pl
Pomak=qpm Pontic=pnt Portuguese=pt Prakrit=pra Primitive_Irish=pgl Punjabi=pa Romanian=ro Romansh=rm Russian=ru
Sanskrit=sa Sardinian=sc Scottish_Gaelic=gd Serbian=sr Seri=sei Shanghainese=wuu Shipibo_Konibo=shp Sicilian=scn
Sindhi=sd Sinhala=si Skolt_Sami=sms Slovak=sk Slovenian=sl Soi=soj Somali=so Sorani=ckb South_Levantine_Arabic=ajp
Spanish=es Spanish_Sign_Language=ssp Sumerian=sux Swahili=sw Swedish=sv Swedish_Sign_Language=swl Swiss_German=gsw
Tagalog=tl Tamil=ta Tatar=tt Teko=eme Telugu=te Telugu_English=qte Tetum=tdt Thai=th Tigrinya=ti Tswana=tn
Tunisian_Arabic=aeb Tupinamba=tpn Turkish=tr Turkish_English=qti Turkish_German=qtd Turkmen=tk Udmurt=udm Ukrainian=uk
Umbrian=xum Upper_Sorbian=hsb Urdu=ur Uyghur=ug Uzbek=uz Vedda=ved Veps=vep Vietnamese=vi Warlpiri=wbp Welsh=cy
West_Frisian=fy Western_Armenian=hyw Western_Sierra_Puebla_Nahuatl=nhi Wolof=wo Xavante=xav Xibe=sjo Yakut=sah
Yiddish=yi Yoruba=yo Yupik=ess Zaar=say Zazaki=zza
"""

LANGUAGE_CODES: dict[str, str] = dict(re.findall(r"(\S+)=(\S+)", _TABLE))
_BY_NAME = {name.casefold(): code for name, code in LANGUAGE_CODES.items()}


def same_language(asked: str, known: Iterable[str]) -> str | None:
    """That one of `known` that is meant by `asked`, or None: itself, else in other letters or by name (EN, English)."""
    known = dict.fromkeys(known)
    if asked in known:
        return asked
    found = [name for name in known if _plain(name) == _plain(asked)]
    return found[0] if len(found) == 1 else None


def _plain(name: str) -> str:
    folded = name.strip().casefold().replace(" ", "_")
    return _BY_NAME.get(folded, folded)
