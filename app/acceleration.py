"""Runs a sentence-transformers model's transformer in OpenVINO, which is faster on CPUs than PyTorch.

Only the transformer: tokenizer, prompts, pooling and further layers stay with sentence-transformers.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from app.telemetry import logger

# OpenVINO would report each conversion to its maker; without this package it reports nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

DType = Literal["float32", "bfloat16"]

SENTENCE = "A table stays in one piece, and its heading with it. "
PROBES = ["?", "How long may a section be?", SENTENCE * 8, SENTENCE * 50]
"""Texts of one token to about 600: a conversion that holds only for the shape that it was made with is found out."""
MIN_COSINE = 0.99
"""Between a probe's vectors from OpenVINO and from PyTorch. With MiniLM in bfloat16 the lowest seen is 0.9999."""


def native_dtype() -> DType:
    """Choose bfloat16 where the CPU computes in it: 1.5 times as fast as float32 there, or more."""
    import openvino

    return "bfloat16" if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"


def accelerate(model: Any, *, dtype: DType, num_threads: int) -> bool:
    """Let OpenVINO run the transformer of a float32 model on the CPU; takes a few seconds.

    Returns False, and leaves the model as it was, if OpenVINO cannot run it or computes something else.
    """
    expected = model.encode(PROBES, normalize_embeddings=True, batch_size=1)
    transformer = model.transformers_model
    try:
        transformer.forward = _compiled(transformer, model.preprocess(PROBES[1:3]), dtype, num_threads)
        found = [model.encode(PROBES, normalize_embeddings=True, batch_size=size) for size in (1, 2)]
        cosine = float((np.stack(found) * expected).sum(axis=-1).min())
        if cosine >= MIN_COSINE:
            return True
        reason = f"cosine to PyTorch's vectors {cosine:.3f}"
    except Exception as error:
        # Whatever a converter raises for an architecture that it does not know: PyTorch knows it.
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if transformer is not None:
        vars(transformer).pop("forward", None)
    logger.warning("the encoder runs in PyTorch, since OpenVINO cannot run it", extra={"reason": reason})
    return False


def _compiled(
    transformer: Any, features: dict[str, Any], dtype: DType, num_threads: int
) -> Callable[..., dict[str, Any]]:
    """Convert and compile the transformer; returns what takes the place of its `forward`."""
    import openvino
    import torch

    accepted = inspect.signature(transformer.forward).parameters
    inputs = {name: value for name, value in features.items() if name in accepted and torch.is_tensor(value)}

    class LastHiddenState(torch.nn.Module):
        """The transformer as the converter wants it: tensors in a fixed order, one tensor out."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, *values: torch.Tensor) -> Any:
            return self.transformer(**dict(zip(inputs, values, strict=True)), return_dict=True).last_hidden_state

    example = tuple(inputs.values())
    with _quietly(), torch.inference_mode():
        traced = torch.jit.trace(LastHiddenState().eval(), example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    converted = openvino.convert_model(traced, example_input=example)
    run = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            # Pinned threads of several replicas would meet on the same cores.
            "ENABLE_CPU_PINNING": False,
        },
    )

    def forward(**given: Any) -> dict[str, Any]:
        states: np.ndarray[Any, Any] = run([given[name].numpy() for name in inputs])[0]
        return {"last_hidden_state": torch.from_numpy(states)}

    return forward


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back the warnings of tracing: of attributes read, and of Python values kept, which the probes check."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
