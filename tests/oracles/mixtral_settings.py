"""Every setting of a default MixtralConfig, as this environment's transformers writes it, into tests/vectors/mixtral_settings.json.

Run in .venv-reference4 and in .venv-reference5.
"""

import json
from pathlib import Path

import transformers

path = Path(__file__).parent.parent / "vectors" / "mixtral_settings.json"
content = json.loads(path.read_text()) if path.exists() else {}
content[transformers.__version__] = json.loads(transformers.MixtralConfig().to_json_string(use_diff=False))
path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
