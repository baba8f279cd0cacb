"""`llmfast generate` and `llmfast chat`: continue a text, or a conversation, with a trained model."""

import itertools
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from .. import hardware, inference, ops
from ..errors import InputError
from ..models import GPT
from ..tokenizers import AnyTokenizer, PretrainedTokenizer
from .runs import load_model, run_folder

Run = Annotated[str | None, typer.Argument(help="A run folder; the newest under runs/ by default.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopK = Annotated[int | None, typer.Option(help="Choose among this many likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the fewest tokens of this probability.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")]
CudaGraph = Annotated[bool, typer.Option(help="Replay a GPU's pass over a token as one graph.")]
Backend = Annotated[str | None, typer.Option(help="Kernel backend: auto, reference, triton.")]


def generate(
    run: Run = None,
    prompt: Annotated[str, typer.Argument(help="The text to continue; empty for a new document.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = None,
    seed: Seed = 0,
    device: Device = None,
    cuda_graph: CudaGraph = True,
    backend: Backend = None,
) -> None:
    """Continue a text with a trained model."""
    where = hardware.device(device)
    with ops.use_backend(backend or ops.current_backend()):
        model, tokenizer = load_model(run_folder(run), where, hardware.compute_dtype(where), _warn)
        stream(inference.Decoder(model, cuda_graph), tokenizer, prompt, max_tokens, temperature, top_k, top_p, seed)


def chat(
    run: Run = None,
    message: Annotated[
        str | None, typer.Option(help="Answer this and exit; else messages are read, a line each.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1000,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = None,
    seed: Seed = 0,
    device: Device = None,
    cuda_graph: CudaGraph = True,
    backend: Backend = None,
) -> None:
    """Talk with an imported model that has a chat template; an empty line or the end of input ends it."""
    where, folder = hardware.device(device), run_folder(run)
    with ops.use_backend(backend or ops.current_backend()):
        model, tokenizer = load_model(folder, where, hardware.compute_dtype(where), _warn)
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise InputError(f"{folder}: was trained on texts, not on conversations; use: llmfast generate {folder}")
        decoder = inference.Decoder(model, cuda_graph)  # kept from one answer to the next
        messages = [{"role": "system", "content": system}] if system is not None else []
        for said in _messages() if message is None else [message]:
            messages.append({"role": "user", "content": said})
            ids = tokenizer.chat_ids(messages)
            answer = "".join(_shown(_continue(decoder, tokenizer, ids, max_tokens, temperature, top_k, top_p, seed)))
            print()
            messages.append({"role": "assistant", "content": answer})


def stream(
    model: GPT | inference.Decoder,
    tokenizer: AnyTokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Print `prompt` and its continuation as it comes, until the document ends."""
    ids = tokenizer.prompt_ids(prompt)
    pieces = _continue(model, tokenizer, ids, max_tokens, temperature, top_k, top_p, seed)
    first = list(itertools.islice(pieces, 1))  # a model that cannot run says so before anything is printed
    for _ in _shown(itertools.chain([prompt], first, pieces)):
        pass
    print()


def _continue(
    model: GPT | inference.Decoder,
    tokenizer: AnyTokenizer,
    ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """The text that the model puts behind `ids`, as it comes."""
    decoder, chosen = tokenizer.stream_decoder(), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    known = {"stop_ids": tokenizer.stop_ids, "vocab_size": tokenizer.vocab_size}
    for token in inference.generate(model, ids, max_tokens, **chosen, **known, seed=seed):
        yield decoder.push(token)
    yield decoder.finish()


def _shown(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces, each printed when it comes."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        yield piece


def _messages() -> Iterator[str]:
    """Lines of the standard input, asked for where somebody types them."""
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _warn(message: str) -> None:
    print("llmfast:", message, file=sys.stderr)
