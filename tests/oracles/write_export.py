"""Our side of check_export.py: a run with an adapter on every target over NF4, exported merged, and the logits of what was written. Of the
bundled Mixtral, or of the bundled model that is named second."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from support import ROOT, finished_run, walked_logits

from moejax.data.tokenizer import load_tokenizer
from moejax.hub import merge, weights
from moejax.runs import export


def main():
    folder, base = Path(sys.argv[1]), ROOT / "assets" / (sys.argv[2] if len(sys.argv) > 2 else "tiny-mixtral")
    experiment = finished_run(folder / "run", model={"source": str(base)})
    export.export(folder / "run", folder / "merged", "merged", True, None)
    written = folder / "sharded"  # the same in five files with an index
    model = export._abstract(experiment, weights.read_config(base), folder / "run")
    merge.save_merged(model, base, written, shard_bytes=1_000_000)
    tokens = np.array(load_tokenizer(str(folder / "merged")).encode(export.PROMPT), np.int32)
    (logits,) = walked_logits(weights.read_config(written), written, tokens, param_dtype=jnp.bfloat16)
    np.savez(folder / "logits.npz", tokens=tokens, logits=logits, prompt=export.PROMPT)


if __name__ == "__main__":
    main()
