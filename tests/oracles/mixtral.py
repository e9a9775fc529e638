"""Mixtral in PyTorch (transformers 4.57.6, fp32, eager): tests/vectors/mixtral.npz. Run: make vectors."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer_pt_utils import LabelSmoother

OUT = Path(__file__).parent.parent / "vectors"
SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=128, rope_theta=1e4,
    sliding_window=None, attn_implementation="eager", router_aux_loss_coef=0.02, pad_token_id=0,
)  # fmt: skip
LENGTHS, PROMPTS = (17, 11, 6), (5, 3, 2)


def make_model(**changes):
    """The same weights for every k: drawn wide, so that neither routing nor attention is near uniform."""
    torch.manual_seed(7)
    model = MixtralForCausalLM(MixtralConfig(**(SIZES | changes))).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def make_batch():
    """Right-padded token ids, attention mask, and labels with the prompt masked out."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=generator)
    position = torch.arange(max(LENGTHS))[None]
    mask = (position < torch.tensor(LENGTHS)[:, None]).long()
    ids = ids * mask
    labels = torch.where((position >= torch.tensor(PROMPTS)[:, None]) & (mask == 1), ids, -100)
    return ids, mask, labels


def versions():
    return json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]})


def expert_counts(router_logits, mask, k):
    """Choices per layer and expert over real tokens."""
    real = mask.reshape(-1).bool()
    chosen = [torch.topk(torch.softmax(logits.float(), -1), k, -1).indices[real] for logits in router_logits]
    return torch.stack([torch.bincount(c.reshape(-1), minlength=SIZES["num_local_experts"]) for c in chosen]).numpy()


def main():
    ids, mask, labels = make_batch()
    out = {
        "config": json.dumps(SIZES),
        "versions": versions(),
        "ids": ids.numpy(),
        "mask": mask.numpy(),
        "labels": labels.numpy(),
    }
    for name, weight in make_model().state_dict().items():
        out[f"w/{name}"] = weight.numpy()
    for case, k in (("top2", 2), ("dense", SIZES["num_local_experts"])):
        model = make_model(num_experts_per_tok=k)
        result = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=False)
        result.loss.backward()
        with torch.no_grad():
            routed = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        aux = load_balancing_loss_func(routed.router_logits, SIZES["num_local_experts"], k, mask)
        out |= {f"{case}/logits": result.logits.detach().numpy(), f"{case}/loss": result.loss.item(), f"{case}/aux": aux.item()}
        out[f"{case}/counts"] = expert_counts(routed.router_logits, mask, k)
        for name, weight in model.named_parameters():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            out[f"{case}/grad/{name}"] = grad.numpy()
    model = make_model()
    logits = model(input_ids=ids, attention_mask=mask).logits
    smooth = LabelSmoother(epsilon=0.1)({"logits": logits}, labels, shift_labels=True)
    smooth.backward()
    out["smooth/loss"] = smooth.item()
    out["smooth/grad/lm_head.weight"] = model.lm_head.weight.grad.numpy()
    model = make_model()
    with_aux = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
    with_aux.loss.backward()
    out["with_aux/loss"] = with_aux.loss.item()
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    out[f"with_aux/grad/{gate}"] = model.get_parameter(gate).grad.numpy()
    for row, length in enumerate(LENGTHS):
        prompt = ids[row : row + 1, : min(length, 8)]
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        out[f"generate/{row}/prompt"], out[f"generate/{row}/tokens"] = prompt[0].numpy(), tokens[0, prompt.shape[1] :].numpy()
    np.savez_compressed(OUT / "mixtral.npz", **out)


if __name__ == "__main__":
    main()
