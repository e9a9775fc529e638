"""Seconds to tokenize and pack a data file, repeated to 15,000 records.

python benchmarks/data_speed.py DATA.json TOKENIZER.json [--records 15000]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from moejax.config import DataConfig
from moejax.data.batching import Batches
from moejax.data.sources import load_records
from moejax.data.tokenize import tokenize
from moejax.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--records", type=int, default=15000)
    options = parser.parse_args()
    config = DataConfig(source=options.data)
    tokenizer = load_tokenizer(options.tokenizer)
    records = load_records(config)
    records = (records * -(-options.records // len(records)))[: options.records]
    start = time.perf_counter()
    tokenized = tokenize(records, tokenizer, "mistral", config.max_length)
    middle = time.perf_counter()
    batches = Batches(tokenized.queries, config, 0)
    rows = batches.rows()
    end = time.perf_counter()
    for _ in batches.iterate(0):
        pass
    assembled = time.perf_counter()
    print(
        f"{len(records)} records: tokenized in {middle - start:.2f} s, packed into {rows} rows of {config.row_tokens} in "
        f"{end - middle:.2f} s, assembled in {assembled - end:.2f} s; padding {100 * batches.waste():.2f} %"
    )


if __name__ == "__main__":
    main()
