"""Looking inside models and at data; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from typing import TYPE_CHECKING

from llmsurgery.api.requests import File

if TYPE_CHECKING:
    from llmsurgery.compute.progress import Progress


def inspect_checkpoint(model: File) -> dict[str, object]:
    """Describe a checkpoint from its headers: architecture, roles, shards, sizes, what each method could touch.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.run.inspect import inspect_model

    return inspect_model(fspath(model))


def trace(
    model: File,
    *,
    prompt: str | None = None,
    subject: str | None = None,
    answer: str | None = None,
    data: File | None = None,
    rows: int = 32,
    kinds: Sequence[str] = ("block", "mlp", "attention"),
    tokens: str = "all",
    window: int = 0,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 1,
    picture: File | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 256,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Trace where a model recalls facts; nothing is changed.

    The subject's embeddings are blurred by noise; states of the clean run are put back, one token and layer (or window
    of layers) at a time, and the part of the answer's probability that returns is the indirect effect.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        prompt: Text that the model goes on from, as it stands.
        subject: Words of the prompt that are blurred.
        answer: What the model answers; its own next token by default. Of several tokens the product counts.
        data: Data file of facts in place of `prompt`; effects are averaged. A row's subject is its key `subject`, or
            the names in its question; rows without one, and facts that the model does not know, are left out and
            counted. Words of an answer that only repeat the question are given, and what follows is traced.
        rows: Rows of `data` that are read; 0 for all.
        kinds: "block", "mlp" and "attention", what is put back.
        tokens: "all", or "subject" for those of the subject alone.
        window: Layers put back at once for "mlp" and "attention"; 0 for a fifth of them, at most 10.
        noise: Noise in standard deviations of the subjects' embeddings; doubled while it is too weak.
        samples: Noise samples per fact.
        seed: Seed of the noise.
        picture: PNG, SVG or PDF file for the heat maps; needs the extra `pictures`.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        batch_size: Rows per forward at most.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work and notices.

    Returns:
        `clean`, `corrupted`, `total_effect`, `noise`, `window`, `facts` and, per kind and group of tokens, `groups`
        with one effect per layer, and `strong_layers`, those with at least half of the highest effect at the last
        subject token; for a single fact also `answer`, `tokens` and `effects` per token.

    Raises:
        InputError: The model does not know the answer.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.heat import check_picture, save_picture
    from llmsurgery.run.trace import TraceRequest, trace_model

    if picture is not None:
        check_picture(fspath(picture))
    request = TraceRequest(
        fspath(model),
        prompt,
        subject,
        answer,
        None if data is None else fspath(data),
        rows,
        tuple(kinds),
        tokens,
        window,
        noise,
        samples,
        seed,
        device,
        dtype,
        batch_size,
        trust_remote_code,
    )
    document = trace_model(request, progress or Silent())
    if picture is not None:
        save_picture(document, fspath(picture))
    return document


def neurons(
    model: File,
    *,
    find: str | None = None,
    layers: str | None = None,
    side: str = "in",
    top: int = 20,
    tokens: int = 5,
    fold_norms: bool = False,
    compare: File | None = None,
    picture: File | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, object]:
    """Name the neurons of the MLPs by the tokens that their weights point to in the head; nothing is changed.

    The model is never loaded: matrices are read one by one, and logits exist for a block of tokens at a time.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        find: List neurons with a form of this word (case, blank, plural) among their first tokens; else the clearest.
        layers: Blocks to look at, such as "0,3-5"; all by default.
        side: "in" for the vectors that read the residual stream (up), "gate" for those that open, "out" for those that
            write (down), "both" for in and out.
        top: Neurons listed, by z of the token they are listed for; 0 for all.
        tokens: First tokens kept of each neuron.
        fold_norms: Multiply by the gains of the norm before (or after) the MLP and of the final norm.
        compare: A checkpoint of the same shape; the share of neurons with the same first token is added.
        picture: PNG, SVG or PDF file for the map of tokens and layers; needs the extra `pictures`.
        device: Where the products are computed.
        progress: Told of long work.

    Returns:
        `decoded` vectors per side, `found`, the listed `neurons` (layer, neuron, part, expert, side, z, margin, p,
        tokens), `map` with the largest z of some tokens per layer, `agreeing` (side both) and `compare`.

    Raises:
        InputError: No form of the word is a single token.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.heat import check_picture
    from llmsurgery.report.neurons import save_neurons
    from llmsurgery.run.neurons import NeuronsRequest, find_neurons

    if picture is not None:
        check_picture(fspath(picture))
    other = None if compare is None else fspath(compare)
    request = NeuronsRequest(fspath(model), find, layers, side, top, tokens, fold_norms, other, device)
    document = find_neurons(request, progress or Silent())
    if picture is not None:
        save_neurons(document, fspath(picture))
    return document


def lens(
    model: File,
    prompt: str,
    *,
    token: str | None = None,
    top: int = 5,
    site: str = "block",
    picture: File | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, object]:
    """Read what a model would say after every layer, by its own final norm and head; nothing is changed.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        prompt: Text that the model goes on from, as it stands.
        token: A word whose first token is followed: its probability and rank are added to every reading.
        top: First tokens of each reading.
        site: "block" for the residual stream after each block, "attention" and "mlp" for what these add to it,
            "middle" for the residual between them.
        picture: PNG, SVG or PDF file; needs the extra `pictures`.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        trust_remote_code: Run model code that the checkpoint brings.

    Returns:
        `tokens` of the prompt, and `readings`: for each layer, the embedding first, one entry of `positions` per token
        with its `top` tokens and, for `token`, `p` and `rank`. The last layer is the model's own answer.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.report.heat import check_picture
    from llmsurgery.report.lens import save_lens
    from llmsurgery.run.lens import LensRequest, read_through_lens

    if picture is not None:
        check_picture(fspath(picture))
    document = read_through_lens(LensRequest(fspath(model), prompt, token, top, site, device, dtype, trust_remote_code))
    if picture is not None:
        save_lens(document, fspath(picture))
    return document


def audit(
    kind: str,
    data: File,
    model: File,
    *,
    keep: float = 0.05,
    score: str = "ln_ches",
    end: bool = True,
    reference: File | None = None,
    window: int = 8,
    tau: float = 20.0,
    most_found: int = 3,
    every: bool = False,
    out: File | None = None,
    picture: File | None = None,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Score preference or fine-tuning data with a model's help, and write what passes a filter; nothing is changed.

    Args:
        kind: "ches": how alike the two answers of a pair are to the model; training on such a pair lowers the
            likelihood of both. "bci": how improbable the spans of an answer were in a reference corpus.
        data: Data file of preference pairs; "bci" takes rows with one answer as well.
        model: Checkpoint directory, `.gguf` file or hub id; "bci" uses its tokenizer alone.
        keep: For "ches", the share of the pairs that is kept, those with the lowest scores.
        score: For "ches", what the filter goes by: "ln_ches", or "ches", which follows the answers' length.
        end: For "ches", whether answers have their end token, as in training.
        reference: For "bci", data file of the corpus.
        window: For "bci", tokens of a span.
        tau: For "bci", the BCI in nats above which a span is flagged.
        most_found: For "bci", spans that the reference holds more often do not count; 0 for no bound.
        every: For "bci", whether spans that the reference does not hold count too.
        out: Output directory for `scores.jsonl` (numbers only), `kept.jsonl` (rows as they were) and `audit.json`; a
            free name below `llmsurgery-out` by default.
        picture: PNG, SVG or PDF file for the distribution of the scores; needs the extra `pictures`.
        force: Replace an existing output.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        batch_size: Rows per forward at most.
        trust_remote_code: Run model code that the checkpoint brings.
        progress: Told of long work and notices.

    Returns:
        The manifest, with `export` "none"; `operations[0].record` holds counts and quantiles of the scores.

    Raises:
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.compute.progress import Silent
    from llmsurgery.report.audit import publish_audit
    from llmsurgery.run.audit import AuditRequest

    corpus = None if reference is None else fspath(reference)
    request = AuditRequest(
        kind, fspath(data), fspath(model), keep, score, end, corpus, window, tau, most_found, every, device, dtype,
        batch_size, trust_remote_code,
    )  # fmt: skip
    places = (None if path is None else fspath(path) for path in (out, picture))
    place, drawing = places
    return publish_audit(request, place, force, drawing, progress or Silent())


def linearity(
    model: File,
    *,
    source: File | None = None,
    text: File | None = None,
    require: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, object]:
    """Check how linear a model's norms are, and what direct logit attribution is worth; nothing is changed.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.
        source: The model before its norms were removed, to compare with.
        text: Data file of plain text; a shipped text by default.
        require: Gates on `linearity.norm_error` and `linearity.attribution_error`.
        device: As for `unlearn`.
        dtype: Compute dtype; float32 by default.
        trust_remote_code: Run model code that a checkpoint brings.

    Returns:
        `models`: "model", and "source" where given -> `path`, `figures`, `norms` with the error of each and
        `components` with that of each component's attribution; `gates`, and `tokens` that were looked at.

    Raises:
        GateError: A gate failed.
        SurgeryError: See `llmsurgery.errors`.
    """
    from llmsurgery.run.linearity import LinearityRequest, check_linearity

    paths = [None if one is None else fspath(one) for one in (source, text)]
    return check_linearity(
        LinearityRequest(fspath(model), paths[0], paths[1], tuple(require), device, dtype, trust_remote_code)
    )
