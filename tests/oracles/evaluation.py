"""Log-likelihoods and batched greedy generation by transformers and PEFT, fp32: tests/vectors/evaluation.npz. Run: make vectors."""

import numpy as np
import torch
from mixtral import OUT, SIZES, make_model, versions
from peft import PeftModel

# (context, continuation): lengths that fall into several of our buckets, and the shortest there are.
PAIRS = ((5, 3), (1, 1), (30, 17), (12, 1), (3, 20), (60, 9), (17, 16), (16, 1))
PROMPTS, NEW = (4, 21, 11, 1, 16), 24
NONE = SIZES["vocab_size"] + 1  # an end token that no model says


def random_tokens(generator, length):
    return torch.randint(1, SIZES["vocab_size"], (length,), generator=generator)


@torch.no_grad()
def score(model, context, continuation):
    """(sum of log p, is every token the likeliest) of a continuation, alone."""
    ids = torch.cat([context, continuation])[None]
    log_p = torch.log_softmax(model(input_ids=ids).logits[0, len(context) - 1 : -1].double(), -1)
    picked = log_p.gather(1, continuation[:, None]).sum()
    return picked.item(), bool((log_p.argmax(-1) == continuation).all())


@torch.no_grad()
def greedy(model, prompts, end):
    """int64 [B, NEW]: prompts of different lengths in one batch, padded on the left; -1 after a row's end token."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    out = torch.nn.functional.pad(out[:, longest:], (0, NEW - (out.shape[1] - longest)))
    ended = torch.cumsum(out == end, 1) - (out == end).long() > 0
    return torch.where(ended, -1, out)


def main():
    generator = torch.Generator().manual_seed(17)
    pairs = [(random_tokens(generator, a), random_tokens(generator, b)) for a, b in PAIRS]
    prompts = [random_tokens(generator, n) for n in PROMPTS]
    model = make_model()
    free = greedy(model, prompts, NONE)
    pairs.append((prompts[1], free[1, :6]))  # one that the model would say itself
    end = int(free[2, 7])  # at most eight tokens for row 2; the others end where they say it, or not at all
    out = {"versions": versions(), "end": end, "none": NONE}
    for row, prompt in enumerate(prompts):
        out[f"prompt/{row}"] = prompt.numpy()
    for row, (context, continuation) in enumerate(pairs):
        out[f"context/{row}"], out[f"continuation/{row}"] = context.numpy(), continuation.numpy()
    adapted = PeftModel.from_pretrained(make_model(), OUT / "peft_all").eval()
    for case, m in (("base", model), ("adapter", adapted)):
        scores = [score(m, *pair) for pair in pairs]
        out[f"{case}/loglikelihood"] = np.array([s for s, _ in scores])
        out[f"{case}/greedy"] = np.array([g for _, g in scores])
        out[f"{case}/free"], out[f"{case}/ended"] = greedy(m, prompts, NONE).numpy(), greedy(m, prompts, end).numpy()
        print(case, out[f"{case}/loglikelihood"].round(3), out[f"{case}/greedy"], (out[f"{case}/ended"] >= 0).sum(1))
    np.savez_compressed(OUT / "evaluation.npz", **out)


if __name__ == "__main__":
    main()
