"""What a run trained, for PyTorch: a PEFT adapter or a merged model, reloaded and compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax import files
from moejax.config import Experiment
from moejax.data import chat
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.estimator.units import told
from moejax.hub import merge, peft, servers, verification, weights
from moejax.hub.layerwise import Checkpoint
from moejax.hub.model import adapter_config, architecture, base_folder, quantization_config, trained_on
from moejax.hub.names import in_and_out
from moejax.hub.quantized_cache import Content
from moejax.hub.servers import SERVERS
from moejax.models.build import Model, build
from moejax.models.config import Architecture
from moejax.progress import bar, say
from moejax.runs import beside, card
from moejax.runs.open import check_base, check_made_of, open_run

PROMPT = (
    "A box holds 12 apples. Tom takes 5 of them and puts 3 pears into it. How many pieces of fruit are in the box now? Write down "
    "each step, then the answer."
)
TOLERANCE = {"peft": 1e-5, "fused": 1e-5, "merged": 0.05}
"""Largest logit difference allowed, as a share of the largest logit. The adapter is the same numbers again; a merged matrix is
rounded to bf16."""


def export(
    folder: Path, target: Path, format_: str | None, verify: bool, tolerance: float | None, for_: str | None = None,
    kind: str | None = None, with_tokenizer: bool = True,
) -> None:  # fmt: skip
    """Write DIR whole or not at all. for_: what is to load an adapter, "peft" or a name of SERVERS. kind, with_tokenizer: of a GGUF file
    (`runs.gguf`). Raises UserError for a mistake, a full disk, what a server or llama.cpp cannot hold, and a model that reloads
    differently."""
    experiment = open_run(folder)
    trained = experiment.adapter is not None
    server = SERVERS.get(for_ or "")
    chosen = format_ or ("peft" if trained or for_ else "merged")
    whole = chosen in ("merged", "gguf")
    if not whole and not trained:
        raise UserError(f"{folder} trained the whole model, so there is no adapter to export: use --format merged")
    if chosen != "gguf" and (kind is not None or not with_tokenizer):
        raise UserError(f"{'--type' if with_tokenizer else '--without-tokenizer'} is of --format gguf, and this is {chosen}: leave it out")
    if target.exists():
        raise UserError(f"{target} exists already: choose another --out (nothing was overwritten)")
    source = experiment.model.source
    if trained and source is None:
        raise UserError(f"{folder}: its base has random weights (model.preset), which nobody else has: nothing to put an adapter on")
    base = base_folder(experiment) if trained else folder / "model"
    assert base is not None  # there is a source
    sizes = architecture(experiment, base)
    chosen = "fused" if chosen == "peft" and in_and_out(sizes) else chosen  # PEFT has no other for it
    if trained:
        check_made_of(folder, experiment, base, _tokenizer(experiment, base))
    pairs = {} if experiment.adapter is None else servers.as_stored(sizes, experiment.adapter.lora.of(sizes))
    if server is not None and experiment.adapter is not None:
        servers.check(server, sizes, pairs, experiment.adapter.lora.token_rows)
    k = sizes.experts_per_token if not whole and sizes.experts_per_token != _own(experiment, base).experts_per_token else None

    def served(base: str, place: str) -> str | None:
        return None if server is None else servers.started(server, base, place, pairs, k)

    planned = _planned(experiment, sizes, base, kind or "f16", with_tokenizer) if chosen == "gguf" else None
    total = 2 * sizes.parameters[0] if planned is None else planned.nbytes  # the whole model in bf16
    aside = files.aside(target)
    try:
        aside.mkdir(parents=True)
        if not whole:
            model = _abstract(experiment, sizes, folder)
            peft.save_adapter(model, aside, str(source), experiment.model.revision, chosen == "fused", trained_on(experiment))
            beside.carry_added_tokens(aside, experiment, _tokenizer(experiment, base))
            if server is not None and server.names:
                servers.rename_targets(server, aside)
        else:
            _write_model(experiment, sizes, folder, base, aside, total, planned)
        own = card.base_name(str(source))
        use = planned.use if planned else card.use(chosen, sizes, own, target.name, k, served(own, target.name))
        card.write(aside, use, folder, experiment, sizes, base if trained else Path(str(source)))
        if verify:
            usual = planned.tolerance if planned else TOLERANCE[chosen]
            limit = usual if tolerance is None else tolerance
            try:
                compared = _compare(experiment, sizes, folder, base, aside, chosen, limit, planned)
                # not (a <= b): logits that are not numbers fail too.
                if not compared.share <= limit:
                    raise verification.Different(f"{_verdict(compared, limit)} (--tolerance sets another limit)")
            except verification.Different as error:
                raise UserError(
                    f"what was written does not compute what was trained: {error}. {target} was not made. Please report this; "
                    "--no-verify writes it all the same"
                ) from None
            say(_verdict(compared, limit))
        if target.exists():
            raise UserError(f"{target} has been written meanwhile, by another export: choose another --out (nothing was overwritten)")
        aside.replace(target)
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error}): nothing is left of it. Free some space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    what = {"peft": "adapter in PEFT's format", "fused": "adapter in PEFT's fused format", "merged": "merged bf16 model"}
    say(f"{what[chosen] if planned is None else planned.told}: {target}{'' if verify else ' (not verified)'}")
    if server is not None:
        say(f"as {server.title} {server.version} loads it (read {server.read}): {served(str(source), str(target))}")
    if chosen == "merged" and sizes.expert_format is not None:
        say(f"its experts are in bf16: those of the base are in {sizes.expert_format.upper()}")
    if sizes.new_rows and not whole:
        say(f"its base lacks {sizes.new_rows} of the tokens: model.resize_token_embeddings({sizes.vocab_size}) before PEFT loads it")


def _own(experiment: Experiment, base: Path) -> Architecture:
    """The base as its own config.json has it."""
    return weights.read_config(base, experiment.model.ignored_settings)


def _abstract(experiment: Experiment, sizes: Architecture, folder: Path) -> Model:
    """Shapes of the base, and the run's adapter."""
    model = build(sizes, quantization=quantization_config(experiment), adapter=adapter_config(experiment))
    if experiment.adapter is not None:
        peft.load_adapter(model, folder / "adapter")
    return model


def _planned(experiment: Experiment, sizes: Architecture, base: Path, kind: str, with_tokenizer: bool) -> Any:
    from moejax.runs import gguf  # its library is slow to import

    return gguf.plan(experiment, sizes, base, _tokenizer(experiment, base), kind, with_tokenizer)


def _write_model(
    experiment: Experiment, sizes: Architecture, folder: Path, base: Path, aside: Path, total: int, planned: Any
) -> None:
    free = shutil.disk_usage(aside).free
    if free < total:
        raise UserError(f"{aside.parent} has {told(free)} free, the model takes {told(total)}: choose another --out")
    with bar("merging", total, "bytes") as advance:
        model = _abstract(experiment, sizes, folder)
        if planned is not None:
            planned.write(model, base, aside, advance)
            return
        merge.save_merged(model, base, aside, progress=advance)
    beside.carry(aside, base, _tokenizer(experiment, base), experiment.data.template or "mistral")


def _tokenizer(experiment: Experiment, base: Path) -> Any:
    """The run's tokenizer; None where the run had none (random tokens)."""
    source = experiment.tokenizer or (str(base) if (base / "tokenizer.json").is_file() else None)
    if source is None:
        return None
    tokenizer, data = load_tokenizer(source, experiment.added_tokens), experiment.data
    chat.settle(tokenizer, data.template or "mistral", data.template_args, data.template_date)
    return tokenizer


def _compare(
    experiment: Experiment, sizes: Architecture, folder: Path, base: Path, written: Path, chosen: str, limit: float, planned: Any
) -> verification.Comparison:
    """The trained and the reloaded model on one prompt, both computed in fp32, a layer at a time in memory. Raises UserError where the
    base's weights are others than the run's."""
    stored = jnp.dtype(experiment.training.compute_dtype if experiment.adapter else experiment.training.stored_dtype)
    arguments: dict[str, Any] = {"param_dtype": stored, "frozen_dtype": stored, "quantization": quantization_config(experiment)}
    arguments |= {"adapter": adapter_config(experiment)}
    own, content = ([], None) if experiment.adapter is None else ([folder / "adapter"], Content())
    if chosen in ("peft", "fused"):
        models = [Checkpoint(sizes, base, [*own, written], arguments, content)]
    else:
        merged = {"param_dtype": jnp.bfloat16}
        reloaded = planned.checkpoint(written) if planned else Checkpoint(weights.read_config(written), written, (), merged)
        models = [Checkpoint(sizes, base, own, arguments, content), reloaded]
    with bar("verifying", sizes.blocks, "layers") as advance:
        rounding = planned.rounding if planned else 0.0
        compared = verification.compare(models, _prompt(experiment, base, sizes), limit, lambda: advance(1), rounding=rounding)
    if content is not None:
        check_base(folder, experiment, content.finish())
    return compared


def _verdict(c: verification.Comparison, limit: float) -> str:
    text = (
        f"verified on {c.tokens} tokens: largest logit difference {c.largest:.2g} ({100 * c.share:.2g} % of the largest logit, at most "
        f"{100 * limit:g} % allowed), {c.equal} of {c.tokens} next tokens equal"
    )
    if c.rerouted:
        text += (
            f", with the trained model's experts; by itself it sends {c.rerouted} of the tokens to another expert in some layer, where two "
            f"are as good as equal (probabilities at most {c.gap:.2g} apart)"
        )
    return text


def _prompt(experiment: Experiment, base: Path, sizes: Architecture) -> np.ndarray:
    """int32 [T]: a fixed text; ids 1, 2, 3 … where there is no tokenizer."""
    tokenizer = _tokenizer(experiment, base)
    ids = list(range(1, 65)) if tokenizer is None else tokenizer.encode(PROMPT)
    return np.array(ids, np.int32)[: sizes.max_position_embeddings] % sizes.vocab_size
