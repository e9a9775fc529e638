"""Faults put into the code one by one, each of which the quick tests must notice: python tests/mutations.py [words of the faults' names]

Each is a few changed words in a copy of the checkout. The tests next to it run there; one of them has to fail by an assertion or an
error, not for want of the words (then this script says so) or because nothing could be collected.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("models", "moejax", "tests", "assets", "benchmarks", "configs", "docs", "pyproject.toml", "README.md", "train.py", "estimate.py")


class Fault(NamedTuple):
    """edits: (file, what stands there once, what shall stand there); tests: of which at least one must fail."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, ((file, old, new),), tests)


LAYERS, STEP, BATCHING, NF4 = "models/layers.py", "moejax/training/step.py", "moejax/data/batching.py", "models/ops/nf4.py"
ATTENTION, MAMBA, SCAN, MOE = "models/ops/attention.py", "models/mamba.py", "models/ops/selective_scan.py", "models/moe.py"
MLA = "models/mla.py"
TILE, GROUPED, CAPACITY = "models/ops/grouped/expert.py", "models/ops/grouped/matmul.py", "models/ops/grouped/capacity.py"
ENTROPY, LOOP, PEFT, MERGE = "models/ops/cross_entropy.py", "moejax/training/loop.py", "moejax/hub/peft.py", "moejax/hub/merge.py"

PACKED = "tests/data/test_batching.py"
MIXTRAL, BLACKMAMBA, LORA, FAMILIES = (f"tests/models/test_{name}.py" for name in ("mixtral_parity", "blackmamba", "lora_parity", "families"))
ONE_STEP, PRECISION, PIPELINE = "tests/training/test_step.py", "tests/models/test_precision.py", "tests/data/test_pipeline.py"
PREFERENCE, PAIRS, TRL = "moejax/training/preference.py", "tests/data/test_preferences.py", "tests/training/test_preference.py"
BACKENDS, MATMUL, SCANS = (f"tests/models/test_{name}.py" for name in ("grouped_backends", "grouped_matmul", "selective_scan"))
SHARDS, STREAMED = "moejax/hub/shards.py", "tests/hub/test_shards.py::test_killed_resumed_and_equal_to_the_bit_on_the_disk_of_one_shard"
OPTIMIZER, EXPORT, RESUME = "tests/training/test_optimizer.py", "tests/runs/test_export.py", "tests/training/test_loop.py"
WINDOWS, GPT_OSS, ROPE = (f"tests/models/test_{name}.py" for name in ("windows", "gpt_oss", "rope"))
PARITY, CACHED = f"{FAMILIES}::test_logits_loss_gradients_and_counts", f"{FAMILIES}::test_cache_and_packed_rows_equal_the_full_pass"
ADAM8, EIGHT_BITS = "moejax/training/adam8.py", "tests/training/test_adam8.py"

FAULTS = [
    fault("a choice's bias is left out", MOE, "probabilities + bias.get_value()", "probabilities", f"{PARITY}[deepseek_v3]"),
    fault("weights of experts are not scaled", MOE, "picked * self.rule.scale", "picked", f"{PARITY}[deepseek_v3]"),
    fault("the shared expert is left out", MOE, "return out + self.shared.product(x, dropout_key), stats", "return out, stats",
          f"{PARITY}[deepseek_v3]"),
    fault("latents are normed with the model's own eps", MLA, "RMSNorm(spec.kv_rank, spec.latent_eps", "RMSNorm(spec.kv_rank, config.stream.norm_eps",
          f"{PARITY}[deepseek_v3]"),
    fault("rotary pairs of latent attention are halves", MLA, "if self.spec.interleaved:", "if False:", f"{PARITY}[deepseek_v3]"),
    fault("rotary halves of latent attention are pairs", MLA, "if self.spec.interleaved:", "if True:", f"{PARITY}[deepseek_v3_halves]"),
    fault("YaRN's factor is not in the scores", MLA, "_scaled(q, spec.score_scale)", "q", f"{PARITY}[deepseek_v2]"),
    fault("YaRN's factor is not in the scores of a cache", MLA, "scale = spec.score_scale * ", "scale = ", f"{CACHED}[deepseek_v2]"),
    fault("a choice's bias is stored in bf16", "moejax/hub/save.py", "jnp.float32 if name in buffers else dtype", "dtype",
          "tests/models/test_latent.py"),
    fault("8 bits: blocks run over the matrices of a stack", ADAM8, 'return 0 if axes[:1] != ("layers",) else', "return 0 if True else", EIGHT_BITS),
    fault("8 bits: between two the odd code", ADAM8, "np.where(np.arange(255) % 2,", "np.where(np.arange(255) % 2 == 0,", EIGHT_BITS),
    fault("8 bits: a small negative moment becomes zero", ADAM8, "_ZERO - 1, code) if signed", "_ZERO, code) if signed", EIGHT_BITS),
    fault("moments in bf16 are rounded to the nearest", "moejax/config_training.py", ' or self.moments_dtype is not None', "",
          "tests/training/test_low_precision.py"),
    fault("stream: a shard stays on the disk", SHARDS, "                fetched.unlink()\n", "", STREAMED),
    fault("stream: what was written before is not checked", SHARDS, "            _remove_damaged(folder, shards)\n", "", STREAMED),
    fault("preference: the reference keeps its adapter", PREFERENCE, "    remove_lora(model)\n", "", TRL),
    fault("preference: the reference keeps the router's adapter", "models/build.py", 'if getattr(module, "lora", None) is not None:',
          'if getattr(module, "lora", None) is not None and not (isinstance(module, Linear) and module.weight.get_value().shape[-2] == 8):', TRL),
    fault("preference: the prompt is counted", PREFERENCE, "batch.loss_mask.reshape(-1)", "(batch.segment_ids > 0).reshape(-1).astype(jnp.float32)",
          TRL),
    fault("preference: the sides are swapped", PREFERENCE, "(Side(*pairs[:, 0].T), Side(*pairs[:, 1].T))",
          "(Side(*pairs[:, 1].T), Side(*pairs[:, 0].T))", TRL),
    fault("preference: IPO divides both by the chosen side's tokens", PREFERENCE, "jnp.maximum(rejected.tokens, 1)", "jnp.maximum(chosen.tokens, 1)",
          f"{TRL}::test_losses_and_gradients"),
    fault("preference: a mean over places for pairs", PREFERENCE, "total(losses(chosen, rejected, settings))", "jnp.sum(losses(chosen, rejected, settings))",
          f"{TRL}::test_what_a_step_minimizes"),
    fault("preference: pairs are torn apart", BATCHING, "[n * int(order[i]) + side for i in row for side in range(n)]",
          "[n * int(order[i]) + side for side in range(n) for i in row]", PAIRS),
    fault("preference: the prompt's answers are trained on", "moejax/data/preferences.py", "on and n >= first", "on", PAIRS),
    fault("rotary: the sign of the second half", LAYERS, "second * cos + first * sin", "second * cos - first * sin", f"{MIXTRAL}::test_logits"),
    fault("rotary: turned the other way", LAYERS, "[first * cos - second * sin, second * cos + first * sin]",
          "[first * cos + second * sin, second * cos - first * sin]", f"{PRECISION}::test_rotary_angles_of_far_positions"),
    fault("labels: not shifted", BATCHING, "at + n - 1] = query.ids[1:]", "at + n - 1] = query.ids[:-1]", PACKED),
    fault("labels: the mask shifted by one", BATCHING, "= query.supervised[1:]", "= query.supervised[:-1]", PACKED),
    fault("packing: attention crosses the border", ATTENTION, "visible = same & (index", "visible = (same | True) & (index",
          "tests/models/test_model.py::test_packed_equals_alone"),
    fault("packing: the scan goes on over the border", MAMBA, "segment_ids != before, None, None)", "jnp.zeros_like(segment_ids, bool), None, None)",
          f"{BLACKMAMBA}::test_packed_equals_alone"),
    fault("packing: the convolution reaches over the border", MAMBA, "(source == segment_ids)[..., None]", "(source >= 0)[..., None]",
          f"{BLACKMAMBA}::test_packed_equals_alone"),
    fault("packing: positions go on over the border", BATCHING, "positions[r, here] = np.arange(n)", "positions[r, here] = np.arange(at, at + n)",
          PACKED),
    fault("one expert's dB is zero", GROUPED, "dlora.b.swapaxes(1, 2)", "dlora.b.swapaxes(1, 2).at[1].set(0)",
          f"{LORA}::test_logits_loss_and_gradients"),
    fault("one expert's dA is zero", GROUPED, "LoRAWeights(dlora.a, ", "LoRAWeights(dlora.a.at[1].set(0), ",
          f"{LORA}::test_logits_loss_and_gradients"),
    fault("LoRA: a shared A's gradient is one product's", TILE, "reduce(jnp.add, parts)", "parts[0]",
          f"{BACKENDS}::test_one_a_for_both_inputs"),
    Fault("the loss is averaged by micro-batch", (
        (STEP, "return sums(objective, trainable, frozen, micro, key)",
         "t, (c, s) = sums(objective, trainable, frozen, micro, key); n = jnp.maximum(jnp.sum(micro.loss_mask), 1)\n"
         "            return t / n, ({name: value / n for name, value in c.items()}, s)"),
        (STEP, "weight = weight_of(batch)\n", "weight = jnp.float32(batch.tokens.shape[0])\n"),
    ), (f"{ONE_STEP}::test_micro_batches_are_one_batch",)),
    fault("NF4: a tie is rounded upward", NF4, "[..., None] > middles", "[..., None] >= middles", "tests/models/test_nf4.py"),
    fault("NF4: double quantization without its offset", NF4, ".min) + offset", ".min) + 0 * offset",
          "tests/models/test_nf4.py"),
    fault("MXFP4: scales one too large", "models/ops/mxfp4.py", "((scale - 1) << bits)", "(scale << bits)", "tests/models/test_mxfp4.py"),
    fault("MXFP4: w1 and w3 are halves of the files' rows", "moejax/hub/names.py", "if self.interleaved:", "if False:",
          "tests/hub/test_mxfp4_files.py::test_codes_and_scales_are_the_files_own"),
    fault("each micro-batch's gradient is clipped", STEP, "return jax.grad(total, has_aux=True)(trainable)",
          "g, extra = jax.grad(total, has_aux=True)(trainable); return optax.clip_by_global_norm(1e-2).update(g, optax.EmptyState())[0], extra",
          f"{ONE_STEP}::test_micro_batches_are_one_batch"),
    fault("resumed at the first data", LOOP, "program.state, self.position = self.checkpoints.newest(program.state)",
          "program.state, _ = self.checkpoints.newest(program.state)", f"{RESUME}::test_20_steps_equal_10_and_resumed_10_to_the_bit"),
    fault("the balance loss's sign", STEP, "total = total + objective.aux_loss_coef", "total = total - objective.aux_loss_coef",
          f"{MIXTRAL}::test_auxiliary_loss"),
    fault("the balance loss counts padding", STEP, "together(jnp.sum(batch.segment_ids > 0))", "together(jnp.int32(batch.segment_ids.size))",
          f"{MIXTRAL}::test_auxiliary_loss"),
    fault("a merged model with w1 and w3 swapped", MERGE, "yield lambda name: merged_tensor(model, name, source, base)",
          'yield lambda name: merged_tensor(model, name.replace(".w1.", ".w9.").replace(".w3.", ".w1.").replace(".w9.", ".w3."), source, base)',
          f"{EXPORT}::test_merging_is_pefts_merging", f"{EXPORT}::test_a_merged_model_computes_what_was_trained"),
    fault("a Mixtral's q and k in a GGUF file as the Hub has them", "moejax/hub/gguf_file.py", "interleaved=True", "interleaved=False",
          "tests/hub/test_gguf_file.py::test_values"),
    fault("sentencepiece's scores the wrong way round", "moejax/data/gguf_tokenizer.py", "scores.setdefault(token, -float(group))",
          "scores.setdefault(token, float(group))", "tests/data/test_gguf_tokenizer.py::test_sentencepiece"),
    fault("an adapter with w1 and w3 swapped", PEFT, 'tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] =',
          'tensors[f"{_PREFIX}{name}.lora_{letter}.weight".replace(".w1.", ".w9.").replace(".w3.", ".w1.").replace(".w9.", ".w3.")] =',
          "tests/hub/test_peft.py"),
    fault("a whole model with w1 and w3 swapped", "moejax/hub/save.py", "for place in places[name]:",
          'for place in places[name.replace(".w1.", ".w9.").replace(".w3.", ".w1.").replace(".w9.", ".w3.")]:',
          "tests/hub/test_weights.py::test_round_trip_is_exact"),
    fault("w1 and w3 swapped in reading and writing", "models/families/attention_moe.py", 'self.matrices, ("w1", "w2", "w3")',
          'self.matrices, ("w3", "w2", "w1")', f"{MIXTRAL}::test_logits"),
    fault("scan: the decay's sign", SCAN, "0.0, jnp.exp(dt[..., None, :] * a))", "0.0, jnp.exp(-dt[..., None, :] * a))", f"{SCANS}::test_values"),
    fault("scan: the sign of the gradient through the decay", SCAN, "through = e * before * g", "through = -e * before * g",
          f"{SCANS}::test_gradients_equal_automatic_differentiation_of_the_reference"),
    fault("scan: the last state's gradient is lost", SCAN, "_outer(dy, t.c), dstate, reverse=True)", "_outer(dy, t.c), 0 * dstate, reverse=True)",
          f"{SCANS}::test_gradients_equal_automatic_differentiation_of_the_reference"),
    fault("a single layer is not recomputed", "models/decoder.py", "apart=stretch.layers == 1", "apart=False",
          "tests/models/test_structure.py::test_a_single_layer_is_recomputed_too"),
    fault("remat routes again", LAYERS, '"full": (*ROUTING_NAMES, *HALFWAY_NAMES)', '"full": HALFWAY_NAMES',
          "tests/models/test_structure.py::test_one_permutation_serves_all_projections"),
    fault("no weight decay", "moejax/training/optimizer.py", "optax.add_decayed_weights(config.weight_decay, decayed)",
          "optax.add_decayed_weights(0.0, decayed)", OPTIMIZER),
    fault("no clipping", "moejax/training/optimizer.py", "return rule if config.clip_norm is None else", "return rule if True else", f"{OPTIMIZER}::test_a_gradient_is_clipped_by_the_norm_of_all_its_parts"),
    fault("dropout: the same at every step", STEP, "key = jax.random.fold_in(jax.random.key(seed), state.step) if objective.dropout",
          "key = jax.random.key(seed) if objective.dropout", f"{ONE_STEP}::test_dropout_is_seeded_and_drawn_anew"),
    fault("dropout: not seeded", STEP, "key = jax.random.fold_in(jax.random.key(seed), state.step) if objective.dropout",
          "key = jax.random.fold_in(jax.random.key(0), state.step) if objective.dropout", f"{ONE_STEP}::test_dropout_is_seeded_and_drawn_anew"),
    fault("dropout: the same in every micro-batch", STEP, "None if key is None else jax.random.fold_in(key, index)", "key",
          f"{ONE_STEP}::test_dropout_is_seeded_and_drawn_anew"),
    fault("dropout: the same in every layer", "models/decoder.py", "fold(dropout_key, index)",
          "dropout_key", f"{ONE_STEP}::test_each_layer_draws_its_own_dropout"),
    fault("dropout: not scaled up", "models/lora.py", "x / (1.0 - self.dropout)", "x", f"{ONE_STEP}::test_dropout_keeps_the_mean"),
    fault("dropout of experts: another mask in the backward pass", TILE, 'dx = dx + self._dropped(self.products.backward(dlow, a), members[0], keys)',
          'dx = dx + self._dropped(jnp.einsum("tr,ri->ti", dlow, a), members[0], keys + 1)', f"{MATMUL}::test_dropout_is_the_same_in_both_passes"),
    fault("dropout of experts: by the place in the batch", GROUPED, "groups.number % of_micro_batch", "groups.number",
          f"{ONE_STEP}::test_layers_take_all_micro_batches_together"),
    fault("micro-batches that pass a layer together are balanced as one", STEP, "jnp.sum(jax.vmap(balance, (1, 0))(stats, batch))",
          "balance(jax.tree.map(lambda a: a.sum(1), stats), batch)", f"{ONE_STEP}::test_layers_take_all_micro_batches_together"),
    fault("evaluation is smoothed", STEP, "label_smoothing=0.0, aux_loss_coef=0.0, ", "aux_loss_coef=0.0, ", f"{ONE_STEP}::test_evaluation_is_plain"),
    fault("capacity drops tokens", CAPACITY, "return jax.lax.fori_loop(0, ends[-1], step, state)", "return jax.lax.fori_loop(0, ends[-1] - 1, step, state)",
          f"{BACKENDS}::test_every_pattern_of_empty_groups"),
    fault("capacity: a tile writes over the next group", CAPACITY, "jnp.where(keep, rows, _rows(array, row, live))", "rows",
          f"{BACKENDS}::test_every_pattern_of_empty_groups"),
    fault("loop: the last tile of a group is left out", "models/ops/grouped/loop.py", "-(-rest // plan.small_tile)", "rest // plan.small_tile",
          f"{BACKENDS}::test_fewer_rows_than_experts", f"{MATMUL}::test_frozen_nf4_weights"),
    fault("loop: a group's gradient takes the next one's rows", "models/ops/grouped/loop.py", "inside = (first + jnp.arange(count) < size)[:, None]",
          "inside = (first + jnp.arange(count) < size + count)[:, None]", f"{MATMUL}::test_frozen_nf4_weights"),
    fault("top-k weights are not renormalized", MOE, "if self.rule.renormalize and not (", "if False and not (",
          f"{MIXTRAL}::test_logits"),
    fault("BlackMamba's weights are renormalized", MOE, "if self.rule.renormalize and not (", "if not (", f"{BLACKMAMBA}::test_logits"),
    fault("Qwen3-MoE's heads are normed after they are turned", "models/attention.py",
          "q, k = self.q_norm(q), self.k_norm(k)\n        return turned(q), turned(k), v",
          "q, k = turned(q), turned(k)\n            return self.q_norm(q), self.k_norm(k), v\n        return turned(q), turned(k), v", FAMILIES),
    fault("a window is one position longer", ATTENTION, "index[None, :] < window", "index[None, :] <= window", WINDOWS),
    fault("gpt-oss's windows are in turn", "models/families/gpt_oss.py", "return self.windowed or tuple", "return tuple",
          f"{PARITY}[gpt_oss_layers]"),
    fault("layers are numbered from one", "models/config/specs.py", "first, found = 0, list", "first, found = 1, list",
          "tests/evaluation/test_expert_load.py::test_a_layer_has_the_models_own_number"),
    fault("a sink has half its gradient", ATTENTION, "- log_sum) * delta)", "- log_sum) * delta / 2)", WINDOWS),
    fault("while decoding a window reaches everywhere", "models/attention.py", "back >= 0 if window is None else", "back >= 0 if True else", GPT_OSS),
    fault("an expert's output bias is not weighted", TILE, "y + p[:, None] * self.bias_out", "y + self.bias_out", BACKENDS),
    fault("the weights' gradient lacks the bias", TILE, 'dp = dp + self.products.with_bias(dy, self.bias_out)', "dp = dp + 0", BACKENDS),
    fault("gpt-oss's gate is clamped below", MOE, "jnp.minimum(up, limit)", "jnp.clip(up, -limit, limit)", f"{PARITY}[gpt_oss]"),
    fault("yarn: the ends of the ramp are never rounded", "models/config/rope.py", "if yarn.truncate else", "if False else", ROPE),
    fault("OLMoE's norms are of each head", "models/families/olmoe.py", '= "all"', '= "head"', FAMILIES),
    fault("FlexOlmo's norms stand before", "models/decoder.py", 'compute, block.norm == "after"', "compute, False", FAMILIES),
    fault("what a norm behind reads is computed again", "models/decoder.py", 'norm(checkpoint_name(out, "halfway"))', "norm(out)",
          "tests/models/test_structure.py::test_w2_is_not_done_again"),
    fault("gate_proj and up_proj swapped", "models/families/attention_moe.py", '("gate_proj", "down_proj", "up_proj")',
          '("up_proj", "down_proj", "gate_proj")', FAMILIES),
    fault("padding is counted as routed", MOE, "chosen & valid[(slice(None), *own, None)]", "chosen",
          f"{MIXTRAL}::test_loss_gradients_and_counts"),
    fault("routing weights have no gradient", GROUPED, "jnp.where(live, g, 0)", "jnp.where(live, 0 * g, 0)", f"{MATMUL}::test_frozen_nf4_weights",
          f"{MATMUL}::test_values_and_gradients"),
    fault("LoRA: alpha is not divided by the rank", "models/config/adapters.py", "return self.alpha / self.rank", "return self.alpha",
          f"{LORA}::test_logits_loss_and_gradients"),
    fault("bf16: the router", MOE, "self.router(x.astype(jnp.float32)", "self.router(x", f"{PRECISION}::test_router_probabilities"),
    fault("bf16: the norm", LAYERS, "wide = x.astype(jnp.float32)\n            normal = wide * jax", "wide = x\n            normal = wide * jax", f"{PRECISION}::test_norm_of_large_numbers"),
    fault("bf16: scores of attention", ATTENTION, '"bgmk,bgkn->bgmn", a, b, preferred_element_type=jnp.float32)', '"bgmk,bgkn->bgmn", a, b)',
          f"{PRECISION}::test_attention_with_large_scores"),
    fault("bf16: logits of the loss", ENTROPY,
          'drows) = carry\n        h, target, m = part\n        logits = jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32)',
          'drows) = carry\n        h, target, m = part\n        logits = jnp.einsum("nd,vd->nv", h, w)', f"{PRECISION}::test_cross_entropy"),
    fault("bf16: angles of rotary positions", LAYERS, "positions[..., None].astype(jnp.float32) * frequency",
          "(positions[..., None].astype(jnp.bfloat16) * frequency.astype(jnp.bfloat16)).astype(jnp.float32)",
          f"{PRECISION}::test_rotary_angles_of_far_positions"),
    fault("bf16: sums of experts' gradients", TILE, "jnp.zeros(a.shape), jnp.zeros(b.shape[::-1]))",
          "jnp.zeros(a.shape, a.dtype), jnp.zeros(b.shape[::-1], b.dtype))",
          f"{PRECISION}::test_gradients_of_experts_are_summed_in_fp32"),
    fault("label smoothing is left out of the gradient", ENTROPY, "jnp.where(one_hot, 1 - smoothing, 0.0) - smoothing / logits.shape[-1]",
          "jnp.where(one_hot, 1.0, 0.0)", f"{MIXTRAL}::test_label_smoothing"),
    fault("epochs in one order", BATCHING, "np.random.default_rng([self.seed, epoch])", "np.random.default_rng([self.seed, 0])", PIPELINE),
    fault("decoding: a token's position is one too far", "models/cache.py", "valid, cache.lengths[:, None], cache.layers", "valid, cache.lengths[:, None] + 1, cache.layers",
          f"{MIXTRAL}::test_cache_equals_full_pass"),
    fault("decoding: the same draw at every step", "moejax/evaluation/generate.py", "jax.random.fold_in(key, step)", "key",
          "tests/evaluation/test_generate.py::test_each_step_draws_anew"),
]  # fmt: skip


def apply(found: Fault, copy: Path) -> str | None:
    """What does not fit, after which nothing is changed."""
    texts: dict[str, str] = {}
    for file, old, new in found.edits:
        text = texts.get(file) or (copy / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            return f"{file} has {old!r} {text.count(old)} times, expected once: write the fault anew"
        texts[file] = text.replace(old, new)
    for file, text in texts.items():
        (copy / file).write_text(text, encoding="utf-8")
    return None


def noticed(found: Fault, copy: Path) -> tuple[bool, str]:
    """(whether a test failed, which ones or what happened instead), of one fault in a copy that is whole again afterwards."""
    why = apply(found, copy)
    if why is not None:
        return False, why
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "--maxfail=2", *found.tests]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "MOEJAX_TEST"))} | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        for file, _, _ in found.edits:
            shutil.copy2(ROOT / file, copy / file)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)  # an error of a fixture; not of collecting, which has no ::
    if done.returncode == 1 and failed:
        return True, failed[0]
    return False, "\n".join((done.stdout + done.stderr).splitlines()[-5:])


def main(words: list[str]) -> int:
    chosen = [found for found in FAULTS if not words or any(word in found.name for word in words)]
    missed, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moejax-faults-") as folder, ThreadPoolExecutor(2) as pool:
        copies = [Path(folder) / str(number) for number in range(2)]
        for copy in copies:
            copy.mkdir()
            for name in COPIED:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results"))
                else:
                    shutil.copy2(ROOT / name, copy / name)

        def part(number: int) -> list[Fault]:
            return chosen[number::2]

        def run(number: int) -> int:
            missed = 0
            for found in part(number):
                good, told = noticed(found, copies[number])
                missed += not good
                print(f"{'noticed' if good else 'MISSED '}  {found.name}: {told}", flush=True)
            return missed

        missed = sum(pool.map(run, range(2)))
    print(f"{len(chosen) - missed} of {len(chosen)} faults noticed in {time.monotonic() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
