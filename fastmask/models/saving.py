"""A model with its subnetworks in one folder, as Hugging Face keeps models: saved, shared and loaded again.

    fm.save_pretrained(model, "folder")        # weights and config as ever; masks, a card and fastmask.json beside them
    model = fm.from_pretrained("folder")       # or a repository of the Hub

`model.save_pretrained`, and so `transformers.Trainer` and `model.push_to_hub`, do the same for an attached model.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastmask.files import FileError, StrPath, digest_of, read_json, sha256_of, write_text
from fastmask.models.attach import attach, attached, is_attached, owner_of
from fastmask.models.calls import ORIGIN, OUTER, UNLOADED, plain_class_of
from fastmask.models.editing import set_subnetworks
from fastmask.models.families import Family
from fastmask.models.one_language import SIZES, shrink
from fastmask.records import Record
from fastmask.subnetworks.subnetworks import Subnetworks, masks_in

ABOUT, MASKS, CARD = "fastmask.json", "subnetworks.safetensors", "README.md"
_MARK = "<!-- made by fastmask -->"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1)]


class About(Record):
    """What `fastmask.json` says of a folder."""

    version: Literal[1] = 1
    kind: Literal["subnetworks", "extracted"]  # an extracted model may have subnetworks of its own
    model_class: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
    forward: Literal["masked", "full"] = "masked"
    base: str | None = None  # the model that it came from, as `transformers` knows it
    revision: str | None = None
    weights: bool = True  # whether they are here; otherwise those of `base`
    files: dict[str, Sha256] = Field(default_factory=dict)  # the masks and the weights
    parameters: dict[str, Sha256] = Field(default_factory=dict)  # by dtype, where the weights are those of `base`
    licence: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)  # how the subnetworks were found
    sizes: dict[str, tuple[Size, Size]] = Field(default_factory=dict)  # of the linear layers of an extracted model


def save_pretrained(
    model: nn.Module,
    folder: StrPath,
    *,
    weights: bool = True,
    licence: str | None = None,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    """Write a model and its subnetworks into a folder, from which `from_pretrained` makes it again.

    A model that `from_pretrained` made goes on saying what it came from, its licence and how its masks were found.

    Args:
        model: with subnetworks attached, or an extracted one.
        folder: where to; made if it is not there.
        weights: False: only the masks (some kilobytes), and the name of the model that they are for. Its weights must
            be unchanged then: `from_pretrained` warns if that model has others.
        licence: an identifier for the card ("apache-2.0").
        metadata: how the subnetworks were found, as names and texts; kept in the masks file and shown on the card.
        options: as for `model.save_pretrained` of `transformers`.

    Raises:
        ValueError: neither subnetworks nor an extracted model, or a part of a model that has some; weights are left
            out of a model without a name, or would be written with adapters between them, which nothing could load;
            metadata that are not texts, or `push_to_hub`, which would not take the masks (`model.push_to_hub` does).
        OSError: it cannot be written.
    """
    owner: Any = owner_of(model)
    sizes = getattr(owner, SIZES, {})
    masked = is_attached(owner)
    if not masked and not sizes:
        raise ValueError(f"this {type(owner).__name__} has no subnetworks attached: model.save_pretrained saves it")
    config = getattr(owner, "config", None)
    if config is None or not hasattr(owner, "save_pretrained"):
        raise ValueError(f"expected a Hugging Face model, given {type(owner).__name__}")
    base, revision = getattr(config, "_name_or_path", "") or None, getattr(config, "_commit_hash", None)
    metadata = dict(metadata or {})
    if (origin := vars(owner).get(ORIGIN)) is not None:
        licence, metadata = licence or origin.licence, {**origin.metadata, **metadata}
        if weights or not origin.weights:  # masks alone are for the weights that were loaded
            base, revision = origin.base, origin.revision
    if not weights and (sizes or base is None):
        raise ValueError("weights=False keeps only masks, for a model that was loaded by name with from_pretrained")
    if masked and OUTER not in vars(owner):
        raise ValueError(
            f"this {type(owner).__name__} is a part of a model with subnetworks attached, whose names and layers they "
            "have: save that model, or detach it before"
        )
    if options.get("push_to_hub"):
        raise ValueError("push_to_hub=True would upload before the masks are there: use model.push_to_hub(repo_id)")
    adapters = {"base_layer", "modules_to_save"}
    adapted = next((name for name, module in owner.named_modules() if adapters & module._modules.keys()), None)
    if weights and adapted is not None and not getattr(owner, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"cannot save weights with an adapter between them ({adapted!r}): merge adapters before attach "
            "(`merge_and_unload()`), or save them with PEFT and the masks alone (weights=False, or `Subnetworks.save`)"
        )
    folder, full = Path(folder), masked and attached(owner).router.full_forward
    plain_class: Any = plain_class_of(owner)
    masks = _masks_as_tensor(attached(owner).subnets, metadata) if masked else None  # fails before anything is written
    if weights:
        state = dict(options.pop("state_dict", None) or owner.state_dict())
        if masks is not None and not full:
            state[UNLOADED] = masks
        plain_class.save_pretrained(owner, folder, state_dict=state, **options)
    if options.get("is_main_process", True):
        folder.mkdir(parents=True, exist_ok=True)
        # By name: deltas, say, may lie beside them, and come and go.
        files = sorted(folder.glob("*model*.safetensors")) if weights else []
        if masked:
            attached(owner).subnets.save(folder / MASKS, metadata)
            files.insert(0, folder / MASKS)
        about = About(
            kind="subnetworks" if masked else "extracted",
            model_class=plain_class.__name__,
            forward="full" if full else "masked",
            base=base,
            revision=revision,
            weights=weights,
            files={path.name: sha256_of(path) for path in files},
            parameters={} if weights or adapted else _sums_of(owner),
            licence=licence,
            metadata=metadata,
            sizes=sizes,
        )
        _write_card(folder / CARD, owner, about)
        write_text(folder / ABOUT, about.model_dump_json(indent=1) + "\n")


def from_pretrained(
    name: StrPath,
    *,
    model_class: Any = None,
    revision: str | None = None,
    family: Family | None = None,
    **options: Any,
) -> Any:
    """Load what `save_pretrained` wrote: a model with its subnetworks attached, or an extracted one.

    Args:
        name: a folder, or a repository of the Hugging Face Hub (from its cache where there is no network).
        model_class: of `transformers`, or one of its auto classes; the one that was saved if not given.
        revision: of the repository.
        family: as for `attach`.
        options: as for `from_pretrained` of `transformers` (`dtype`, `device_map`, ...).

    Raises:
        FileNotFoundError: no such folder, or nothing of fastmask in it.
        ValueError: `output_loading_info`.
        FileError: a ValueError; a file is damaged, is not the one that was saved, or is of another version.
    """
    if options.get("output_loading_info"):
        raise ValueError("output_loading_info=True is not supported here: the result is the model alone")
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(_downloaded(str(name), revision))
    if not (folder / ABOUT).exists():
        hint = ""
        if run := next((run for run in (folder, folder.parent) if masks_in(run)), None):
            load = f"fastmask.Subnetworks.load({str(run)!r})"
            hint = f" (masks of a run are beside its model: attach {load} to the plain model)"
        raise FileNotFoundError(f"{folder}: has no {ABOUT}, so it was not saved by fastmask.save_pretrained{hint}")
    about: About = read_json(folder / ABOUT, About)
    for file, sha in about.files.items():
        if "/" in file or sha256_of(folder / file) != sha:
            raise FileError(folder / file, "is not the file that was saved with the subnetworks (SHA-256 differs)")
    if model_class is None:
        model_class = getattr(importlib.import_module("transformers"), about.model_class, None)
        if model_class is None:
            raise FileError(folder / ABOUT, f"names {about.model_class!r}, which is no model of this transformers")
    if about.kind == "extracted":
        return _from(about, _loaded(model_class, folder, about, options))
    subnets = Subnetworks.load(folder / MASKS)
    if about.weights:
        model = _loaded(model_class, folder, about, options)
        if not Path(name).is_dir():  # where others find it, and not where the cache is
            model.config._name_or_path, model.config._commit_hash = str(name), folder.name
    elif about.base is None:
        raise FileError(folder / ABOUT, "has neither weights nor the name of a base model")
    else:
        model = model_class.from_pretrained(about.base, revision=about.revision, **options)
        found = _sums_of(model) if about.parameters else {}
        if found.keys() == about.parameters.keys() and found != about.parameters:
            warnings.warn(
                f"{folder}: the weights of {about.base} are not those that the masks were saved with, which were "
                "trained, or have a head that was drawn anew. Load them into the model, or save masks and weights "
                "together: fastmask.save_pretrained(model, folder)",
                stacklevel=2,
            )
    return _from(about, attach(model, subnets, about.forward, family=family))


def _from(about: About, model: Any) -> Any:
    """The model, which remembers what it was loaded from; `detach` forgets that."""
    setattr(model, ORIGIN, about)
    return model


def _masks_as_tensor(subnets: Subnetworks, metadata: Mapping[str, str]) -> Tensor:
    """The bytes of the file of masks."""
    with tempfile.TemporaryDirectory() as folder:
        subnets.save(path := Path(folder) / MASKS, metadata)
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def restore_masks(model: nn.Module, saved: Tensor) -> None:
    """Give an attached model the subnetworks that weights, which are about to be loaded into it, were saved with."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / MASKS).write_bytes(saved.cpu().to(torch.uint8).numpy().tobytes())
            subnets = Subnetworks.load(path)
    except ValueError:  # of weights that were averaged, say, or cast
        warnings.warn(
            "the weights that are loaded have no masks that can be read: those attached stay as they are", stacklevel=2
        )
        return
    if subnets == attached(model).subnets.map(lambda keep: keep.cpu()):
        return
    said = "the weights that are loaded were saved with other subnetworks than are attached"
    try:
        set_subnetworks(model, subnets)
    except ValueError as error:
        warnings.warn(f"{said}, which stay as they are ({error})", stacklevel=2)
    else:
        warnings.warn(f"{said}, and bring those along", stacklevel=2)


def _loaded(model_class: Any, folder: Path, about: About, options: dict[str, Any]) -> Any:
    """The plain model, loaded as transformers loads it, by a class that knows what is special about the folder."""
    if not hasattr(model_class, "_keys_to_ignore_on_load_unexpected"):  # an auto class
        config = options.get("config") or importlib.import_module("transformers").AutoConfig.from_pretrained(folder)
        model_class = model_class._model_mapping[type(config)]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        shrink(self, about.sizes)

    ignored = [*(model_class._keys_to_ignore_on_load_unexpected or ()), UNLOADED]
    space = {"_keys_to_ignore_on_load_unexpected": ignored, "__init__": init, "__module__": model_class.__module__}
    knowing: Any = type(model_class.__name__, (model_class,), space)
    model = knowing.from_pretrained(folder, **options)
    model.__class__ = model_class
    if about.sizes:
        setattr(model, SIZES, dict(about.sizes))
    return model


def _sums_of(model: nn.Module) -> dict[str, str]:
    """A checksum of all parameters, under their dtypes; empty where they are not plain tensors (shards, quantised)."""
    named = dict(model.named_parameters())
    if any(type(parameter.data) is not torch.Tensor or parameter.is_meta for parameter in named.values()):
        return {}
    return {" ".join(sorted({str(parameter.dtype) for parameter in named.values()})): digest_of(named, {})}


def _downloaded(name: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"no such folder: {name} (and no huggingface_hub to look for it on the Hub)") from None
    try:
        found: str = snapshot_download(name, revision=revision)
    except Exception as error:
        if isinstance(error, ValueError) or type(error).__module__.startswith(("huggingface_hub", "httpx")):
            said = str(error).splitlines()[0]
            raise FileNotFoundError(f"{name}: no such folder, and not on the Hub: {said}") from error
        raise
    return found


def _write_card(path: Path, owner: Any, about: About) -> None:
    """A model card; one that somebody else wrote is left alone."""
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    lines = ["---", "library_name: fastmask", "tags: [fastmask, subnetworks]"]
    lines += [f"base_model: {about.base}"] if about.base and not Path(about.base).exists() else []
    lines += [f"license: {about.licence}"] if about.licence else []
    lines += ["---", _MARK, "", f"# {about.model_class} with subnetworks", ""]
    if about.kind == "subnetworks":
        subnets = attached(owner).subnets
        lines += ["| language | " + " | ".join(subnets.density) + " |", "|---" * (1 + len(subnets.density)) + "|"]
        for row, language in enumerate(subnets.languages):
            shares = [f"{float(share[row]):.0%}" for share in subnets.density.values()]
            lines.append(f"| {language} | " + " | ".join(shares) + " |")
        lines += ["", "Shares of heads, neurons or weights that each language owns.", ""]
        lines += [f"- {name}: {text}" for name, text in about.metadata.items()]
    else:
        lines += ["One language's subnetwork, cut out: its layers have sizes of their own.", ""]
    lines += ["", "```python", "import fastmask as fm", "", 'model = fm.from_pretrained("...")', "```", ""]
    write_text(path, "\n".join(lines))
