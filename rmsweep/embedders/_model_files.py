"""A language model's files: where they lie, which of them decide its numbers, what must be refused unread.

Nothing is downloaded: a name of the Hugging Face hub stands for the snapshot in the local cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rmsweep.errors import DataError
from rmsweep.paths import user_path
from rmsweep.problems import Problems, shown

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PATTERNS = (  # what transformers may read: a file too many costs a digest, one too few a stale result
    "*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
WITHOUT_EFFECT = {"generation_config.json", "trainer_state.json", "requirements.txt"}
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


class Limits(NamedTuple):
    """What a model's config says of its size; None where it does not say."""

    dim: int | None
    layers: int | None
    positions: int | None


def find(model: str, revision: str | None) -> Path:
    """The folder of `model`: a path, or a name of the hub that is in the local cache.

    Raises DataError when there is no such folder or snapshot, or the library is missing.
    """
    check_installed()
    if not model:
        raise DataError("embedder.model is not set; embedder.model=FOLDER or NAME_ON_THE_HUB names a language model")
    folder = user_path(model, "embedder.model")
    if folder.is_dir():
        if revision is not None:
            raise DataError(
                f"embedder.revision={shown(revision)}: goes with a name of the hub, embedder.model={shown(model)} "
                "is a folder; leave it null"
            )
        return folder
    if not HUB_NAME.fullmatch(model):
        raise DataError(f"embedder.model={shown(model)}: no such folder, and no name of the hub either (owner/name)")
    return _cached(model, revision)


def check_installed() -> None:
    """DataError with the remedy when transformers is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise DataError("embedder transformer needs the library transformers: pip install 'transformers>=5.3,<6'")


def _cached(model: str, revision: str | None) -> Path:
    """The snapshot of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    found = None
    with contextlib.suppress(HFValidationError):  # a name that the hub cannot have
        found = try_to_load_from_cache(model, CONFIG, revision=revision)
    if isinstance(found, str):
        return Path(found).parent
    at, option = ("", "") if revision is None else (f" at revision {revision}", f" --revision {revision}")
    raise DataError(
        f"embedder.model={shown(model)}: no such folder, and not in the local Hugging Face cache{at}; "
        f"nothing is downloaded here: hf download {model}{option} (or set HF_HOME to where the cache is)"
    )


def deciding(folder: Path) -> dict[str, Path]:
    """Files whose bytes decide the model's numbers, by their name in `folder`."""
    found = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): path for path in found if path.name not in WITHOUT_EFFECT}


def check(folder: Path) -> dict[str, Any]:
    """The model's config; DataError with every problem of the folder."""
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder}: no {CONFIG}; needed: a model as transformers' save_pretrained leaves it")
    config = _json(folder / CONFIG)
    problems = Problems(folder, note="")
    problems.add(*_weight_problems(folder), *_config_problems(config))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        problems.add(f"no tokenizer; needed: {' or '.join(TOKENIZERS)} (tokenizer.save_pretrained writes it)")
    if (folder / "adapter_config.json").is_file():
        problems.add(
            "an adapter (adapter_config.json), not a model; needed: merge_and_unload(), then save_pretrained()"
        )
    problems.check()
    return config


def limits(config: Mapping[str, Any]) -> Limits:
    """Sizes under the names that configs have for them, also where the text model is a part of a larger one."""
    text = config.get("text_config")
    merged = {**config, **(text if isinstance(text, dict) else {})}

    def first(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := merged.get(name), int) and value > 0), None)

    return Limits(
        first("hidden_size", "n_embd", "d_model", "dim"),
        first("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        first("max_position_embeddings", "n_positions"),
    )


def check_limits(found: Limits, layer: int, max_length: int | None) -> None:
    """DataError when the model has no such layer or not so many positions."""
    if found.layers is not None and not -found.layers - 1 <= layer <= found.layers:
        raise DataError(
            f"embedder.layer={layer}: this model has {found.layers} layers; allowed: 0 (before the first) to "
            f"{found.layers}, or -1 (the last) to {-found.layers - 1}"
        )
    if found.positions is not None and max_length is not None and max_length > found.positions:
        raise DataError(
            f"embedder.max_length={max_length}: this model has {found.positions} positions; allowed: "
            f"2 to {found.positions}, or null"
        )


def _weight_problems(folder: Path) -> Iterator[str]:
    """Weights that are missing, pickled, or outside the folder."""
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        only = f", only {', '.join(pickled[:3])}, and such files may run code when they are read" if pickled else ""
        yield f"no {WEIGHTS} or {INDEX}{only}; needed: save_pretrained(FOLDER, safe_serialization=True)"
        return
    shards = _json(folder / INDEX).get("weight_map")
    for name in sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else ():
        if Path(name).name != name or not name.endswith(".safetensors"):
            yield f"{INDEX} names {shown(name)}; allowed: .safetensors files of the same folder"
        elif not (folder / name).is_file():
            yield f"{INDEX} names {name}, which is missing; download the model again"


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What config.json asks for and is not given."""
    if config.get("is_encoder_decoder"):
        yield f"{CONFIG}: an encoder-decoder has no one state per token; allowed: decoders and encoders"
    for key, allowed in (
        ("quantization_config", "weights in fp32, fp16 or bf16; save the model dequantised"),
        ("transformers_weights", "weights under their usual name"),
    ):
        if config.get(key) is not None:
            yield f"{CONFIG}: {key} is set; allowed: {allowed}"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {shown(value)}; needed: a JSON object")
    return value
