"""`llmfast generate`: continue a text with a trained model."""

import itertools
import sys
from typing import Annotated

import typer

from .. import hardware, inference, ops
from ..models import GPT
from ..tokenizers import StreamDecoder, Tokenizer
from .runs import load_model, run_folder


def generate(
    run: Annotated[str | None, typer.Argument(help="A run folder; the newest under runs/ by default.")] = None,
    prompt: Annotated[str, typer.Argument(help="The text to continue; empty for a new document.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among this many likeliest tokens.")] = 50,
    top_p: Annotated[float | None, typer.Option(help="Choose among the fewest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernel backend: auto, reference, triton.")] = None,
) -> None:
    """Continue a text with a trained model."""
    where = hardware.device(device)
    with ops.use_backend(backend or ops.current_backend()):
        model, tokenizer = load_model(run_folder(run), where, hardware.compute_dtype(where), _warn)
        stream(model, tokenizer, prompt, max_tokens, temperature, top_k, top_p, seed)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Print `prompt` and its continuation as it comes, until the document ends.

    Like every document in training the text begins after an end-of-text token.
    """
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    tokens = inference.generate(
        model,
        ids,
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=[tokenizer.eot_id],
    )
    decoder = StreamDecoder(tokenizer)
    first = list(itertools.islice(tokens, 1))  # a model that cannot run says so before anything is printed
    sys.stdout.write(prompt)
    for token in itertools.chain(first, tokens):
        sys.stdout.write(decoder.push(token))
        sys.stdout.flush()
    sys.stdout.write(decoder.finish() + "\n")


def _warn(message: str) -> None:
    print("llmfast:", message, file=sys.stderr)
