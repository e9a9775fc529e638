# make demo: set everything up and fine-tune the bundled model. make test: set everything up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_FLAGS := --quiet --disable-pip-version-check
# The CUDA plugin and ptxas, beside the environment: in it, every start of jax would look for a GPU and complain.
AOT := .venv-aot
AOT_ENVIRONMENT := PYTHONPATH=$(AOT) JAX_PLATFORMS=cpu
# The TPU compiler, likewise.
AOT_TPU := .venv-aot-tpu
AOT_TPU_ENVIRONMENT := PYTHONPATH=$(AOT_TPU) JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1

.PHONY: aot aot-tpu soak supply versions test-jax12 gpu-acceptance demo demo-blackmamba demo-dpo demo-qwen3 characterize-demo characterize-smoke test-long test-slow demo-sparse-vs-dense test lint bench bench-gpu curves frameworks vectors pretrain-tiny-mixtral pretrain-tiny-blackmamba pretrain-tiny-qwen3-moe reference4 reference5 clean help

help:
	@sed -n '1p' Makefile; grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /: /'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 to 3.13: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up $(VENV) (once, some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[test]' -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP) ## QLoRA fine-tuning of the bundled Mixtral on word problems, and its accuracy before and after
	@rm -rf runs/demo
	@$(BIN)/python train.py --config configs/demo.yaml
	@$(BIN)/moejax exact-match runs/demo --data assets/problems/test.json

test: lint $(VENV)/.profile $(VENV)/.eval $(AOT)/.installed ## ruff, mypy and the test suite
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal
	@MOEJAX_TEST_XLA=usual $(AOT_ENVIRONMENT) $(BIN)/python -m pytest -q -n 2 tests/training/test_gpu_compile.py

# As a user compiles (without XLA's flags of tests/conftest.py), the tests marked `long` too; faults that the quick tests must notice.
test-long: $(STAMP) $(VENV)/.profile $(VENV)/.eval $(VENV)/.llamacpp $(VENV)/.wandb $(AOT_TPU)/.installed ## every test, faults put in one by one, the whole study (some 2.5 hours on 2 cores)
	@MOEJAX_TEST_XLA=usual $(BIN)/python -m pytest -q -n 2 --dist worksteal -m ''
	@MOEJAX_TEST_XLA=usual $(AOT_TPU_ENVIRONMENT) $(BIN)/python -m pytest -q -m long tests/training/test_tpu_compile.py
	@$(BIN)/python tests/mutations.py
	@rm -rf runs/characterize-demo
	@$(MAKE) --no-print-directory characterize-demo
	@$(BIN)/python tests/check_study.py runs/characterize-demo
	@$(MAKE) --no-print-directory test-jax12

test-slow: $(STAMP) $(VENV)/.profile $(VENV)/.eval $(VENV)/.llamacpp $(VENV)/.wandb ## of test-long the tests that are not in `make test`, compiled as quickly as there
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m long

# jax 0.11 and 0.12 need Python 3.12; constraints.txt holds the versions of 3.11. In environments of its own.
JAX12 := .venv-jax12
test-jax12: ## the tests of models, GPU programs and steps on jax 0.12: make test-jax12 PYTHON=python3.12 (skipped by an older Python)
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then $(MAKE) --no-print-directory $(JAX12)/.tested; \
	  else echo "test-jax12: skipped: jax 0.12 needs Python 3.12, and this is $$($(PYTHON) --version); make test-jax12 PYTHON=python3.12"; fi

$(JAX12)/.installed: pyproject.toml
	@test -x $(JAX12)/bin/python || $(PYTHON) -m venv $(JAX12)
	@$(JAX12)/bin/python -m pip install $(PIP_FLAGS) -e '.[test]' 'jax>=0.12,<0.13'
	@$(JAX12)/bin/python -m pip install $(PIP_FLAGS) --no-deps --target $(JAX12)/aot nvidia-cuda-nvcc-cu12 \
	  $$($(JAX12)/bin/python -c 'import jaxlib; print(*(f"jax-cuda12-{name}=={jaxlib.__version__}" for name in ("plugin", "pjrt")))')
	@touch $@

.PHONY: $(JAX12)/.tested
$(JAX12)/.tested: $(JAX12)/.installed
	@$(JAX12)/bin/python -m pytest -q -n 2 --dist worksteal tests/models tests/training
	@MOEJAX_TEST_XLA=usual PYTHONPATH=$(JAX12)/aot JAX_PLATFORMS=cpu $(JAX12)/bin/python -m pytest -q -n 2 tests/training/test_gpu_compile.py

# For compiling for a GPU that is not there: 230 MB of wheels.
$(AOT)/.installed: $(STAMP)
	@rm -rf $(AOT)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $(AOT) jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 -c constraints.txt
	@touch $@

# For compiling for a TPU that is not there: 230 MB, libtpu in the version that jax[tpu] of this jax asks for.
$(AOT_TPU)/.installed: $(STAMP)
	@rm -rf $(AOT_TPU)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $(AOT_TPU) libtpu -c constraints.txt
	@touch $@

aot-tpu: $(AOT_TPU)/.installed ## compile the published models' steps for TPU slices that are not there: bytes, FLOPs, layouts
	@$(AOT_TPU_ENVIRONMENT) $(BIN)/python benchmarks/tpu_programs.py --out $(or $(OUT),benchmarks/results/$$(date +%F)-tpu-compiled.json) $(OPTIONS)

aot: $(AOT)/.installed ## compile every config's step for GPUs and TPUs that are not there (goes on where it ended; OPTIONS=--every: at many shapes, hours)
	@$(AOT_ENVIRONMENT) $(BIN)/python benchmarks/aot_grid.py --out $(or $(OUT),benchmarks/results/$$(date +%F)-aot-grid.jsonl) $(OPTIONS)
	@$(MAKE) --no-print-directory aot-tpu OUT= OPTIONS=

gpu-acceptance: ## the first 20 minutes on a card, with PYTHON as it is: is it in order, are the numbers right, what do the real steps take, what is fastest
	@$(PYTHON) benchmarks/gpu_acceptance.py $(OPTIONS)

# For tests: TensorBoard's Profile tab, which one asks for a trace, lm-evaluation-harness, llama.cpp, Weights & Biases (none needs PyTorch).
$(VENV)/.profile $(VENV)/.eval $(VENV)/.llamacpp $(VENV)/.wandb: $(VENV)/.%: $(STAMP)
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[$*]' -c constraints.txt
	@touch $@

lint: $(STAMP) ## ruff, mypy, and words, links and commands of the docs
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python tests/lint_docs.py

supply: $(STAMP) ## licences of the packages that are used here, and their known weaknesses (pip-audit, if it is installed)
	@$(BIN)/python benchmarks/supply.py

versions: $(STAMP) ## the quick tests with the lowest and newest versions that are allowed, by each Python on the path (hours on 2 cores)
	@$(BIN)/python benchmarks/versions.py

bench: $(STAMP) reference4 reference5 ## one training step and PyTorch's, in turn, on this machine
	@$(BIN)/python benchmarks/step_times.py --cpu --out benchmarks/results/$$(date +%F)-cpu-step.json

curves: $(STAMP) reference4 reference5 ## learning curves next to PyTorch's, from one initialization on the same batches (some 15 minutes)
	@$(BIN)/python benchmarks/curves.py

frameworks: $(STAMP) reference4 reference5 ## where a step's time goes next to PyTorch's and the paper's; the table of benchmarks/results/frameworks.md
	@$(BIN)/python benchmarks/side_by_side.py

bench-gpu: $(STAMP) reference4 reference5 ## both frameworks on this GPU at the real shapes, random weights
	@$(BIN)/python benchmarks/step_times.py --out benchmarks/results/$$(date +%F)-gpu-frameworks.json

characterize-demo: $(STAMP) ## the study's experiments on the bundled Mixtral and BlackMamba, and the page about them (some 9 minutes on 2 cores)
	@$(BIN)/moejax characterize --preset cpu-demo --out runs/characterize-demo
	@$(BIN)/moejax report runs/characterize-demo

characterize-smoke: $(STAMP) ## the same with two throughput trials a model: does it run
	@$(BIN)/moejax characterize --preset cpu-smoke --out runs/characterize-smoke
	@$(BIN)/moejax report runs/characterize-smoke

soak: $(STAMP) ## 50 tiny runs stopped at random moments and resumed; then 20,000 damaged files for each reader (an hour on 2 cores)
	@$(BIN)/moejax selftest --rounds 50
	@$(BIN)/python tests/fuzz.py

demo-blackmamba: $(STAMP) ## full fine-tuning of the bundled BlackMamba on the same problems, and its accuracy before and after
	@rm -rf runs/demo_blackmamba
	@$(BIN)/python train.py --config configs/demo_blackmamba.yaml
	@$(BIN)/moejax exact-match runs/demo_blackmamba --data assets/problems/test.json

demo-qwen3: $(STAMP) ## QLoRA fine-tuning of the bundled Qwen3-MoE on the same problems, and its accuracy before and after
	@rm -rf runs/demo_qwen3
	@$(BIN)/python train.py --config configs/demo_qwen3.yaml
	@$(BIN)/moejax exact-match runs/demo_qwen3 --data assets/problems/test.json

demo-dpo: $(STAMP) ## preference training (DPO) of the bundled Mixtral on pairs of answers, and its accuracy before and after
	@rm -rf runs/dpo_demo
	@$(BIN)/python train.py --config configs/dpo_demo.yaml

demo-sparse-vs-dense: $(STAMP) ## the demo's task for ten epochs with 2 of 8 experts and with all; accuracy by epoch next to the study's
	@rm -rf runs/demo_sparse runs/demo_dense
	@$(BIN)/python train.py --config configs/demo_sparse_vs_dense.yaml name=demo_sparse
	@$(BIN)/python train.py --config configs/demo_sparse_vs_dense.yaml name=demo_dense model.experts_per_token=8
	@$(BIN)/moejax compare runs/demo_sparse runs/demo_dense --plot runs/sparse_vs_dense.png

pretrain-tiny-blackmamba: $(STAMP) ## remake assets/tiny-blackmamba (some 10 minutes on 2 cores)
	@$(BIN)/python assets/problems/make.py pretrain assets/generated
	@rm -rf runs/pretrain_tiny_blackmamba
	@$(BIN)/python train.py --config configs/pretrain_tiny_blackmamba.yaml
	@cp runs/pretrain_tiny_blackmamba/model/* assets/tiny-blackmamba/

pretrain-tiny-mixtral: $(STAMP) ## remake assets/tiny-mixtral (some 10 minutes on 2 cores)
	@$(BIN)/python assets/problems/make.py pretrain assets/generated
	@rm -rf runs/pretrain_tiny_mixtral
	@$(BIN)/python train.py --config configs/pretrain_tiny_mixtral.yaml
	@cp runs/pretrain_tiny_mixtral/model/* assets/tiny-mixtral/

pretrain-tiny-qwen3-moe: $(STAMP) ## remake assets/tiny-qwen3-moe (some 20 minutes of CPU time)
	@$(BIN)/python assets/problems/make.py pretrain assets/generated
	@rm -rf runs/pretrain_tiny_qwen3_moe
	@$(BIN)/python train.py --config configs/pretrain_tiny_qwen3_moe.yaml
	@cd runs/pretrain_tiny_qwen3_moe/model && cp config.json generation_config.json model.safetensors ../../../assets/tiny-qwen3-moe/

reference4: .venv-reference4/.installed ## PyTorch's side: transformers 4.57.6, peft 0.18.1, bitsandbytes
reference5: .venv-reference5/.installed ## PyTorch's side: transformers 5, peft 0.21, trl 1.16

.venv-reference%/.installed: tests/oracles/requirements-reference%.txt
	@test -x .venv-reference$*/bin/python || $(PYTHON) -m venv .venv-reference$*
	@.venv-reference$*/bin/python -m pip install $(PIP_FLAGS) -r $<
	@touch $@

vectors: reference4 reference5 ## remake tests/vectors with PyTorch
	@for script in mixtral lora nf4 adam8 blackmamba evaluation token_rows; do OMP_NUM_THREADS=1 .venv-reference4/bin/python tests/oracles/$$script.py; done
	@for script in lora_fused mxfp4 families rope preferences token_rows; do OMP_NUM_THREADS=1 .venv-reference5/bin/python tests/oracles/$$script.py; done

clean: ## remove environments and generated text; runs/ stays
	rm -rf $(VENV) $(AOT) $(AOT_TPU) $(JAX12) .venv-versions .venv-reference4 .venv-reference5 assets/generated
