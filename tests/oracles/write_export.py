"""Our side of check_export.py: a run with an adapter on every target and two added tokens over NF4, exported merged; the logits of what was
written, and what run and merged model answer in a chat. Of the bundled Mixtral, or of the bundled model that is named second."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from support import ROOT, finished_run, walked_logits

import moejax
from moejax.data.tokenizer import CHATML_TOKENS, load_tokenizer
from moejax.hub import merge, weights
from moejax.models.config import LORA_TARGETS
from moejax.runs import export

ASKED = "Tom has 24 apples. He buys 15 more and gives 12 to Mia. How many apples does Tom have now?"
TOKENS = 409  # of the bundled tokenizer


def main():
    folder, base = Path(sys.argv[1]), ROOT / "assets" / (sys.argv[2] if len(sys.argv) > 2 else "tiny-mixtral")
    experiment = finished_run(
        folder / "run", model={"source": str(base)}, added_tokens=list(CHATML_TOKENS), tokenizer=str(base),
        adapter={"rank": 2, "alpha": 4.0, "targets": list(LORA_TARGETS), "token_rows": list(range(TOKENS, TOKENS + 2))},
        data={"source": str(ROOT / "assets/problems/train.json"), "template": "chatml"},
    )  # fmt: skip
    export.export(folder / "run", folder / "merged", "merged", True, None)
    written = folder / "sharded"  # the same in five files with an index
    model = export._abstract(experiment, weights.read_config(base), folder / "run")
    merge.save_merged(model, base, written, shard_bytes=1_000_000)
    tokens = np.array(load_tokenizer(str(folder / "merged")).encode(export.PROMPT), np.int32)
    (logits,) = walked_logits(weights.read_config(written), written, tokens, param_dtype=jnp.bfloat16)
    models = [moejax.load(folder / name) for name in ("run", "merged")]
    answers = [[lm.chat(ASKED, max_new_tokens=24), lm.generate(f"[INST] {ASKED} [/INST]", max_new_tokens=24)] for lm in models]
    np.savez(folder / "logits.npz", tokens=tokens, logits=logits, prompt=export.PROMPT, asked=ASKED, answers=answers)


if __name__ == "__main__":
    main()
