"""What other tools call the same settings (transformers, PEFT, TRL, LLaMA-Factory, axolotl, Unsloth): for messages alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_KEYS: dict[str, str] = {
    # the optimizer and its course
    "training.learning_rate": "lr, base_lr, max_lr, peak_lr, init_lr",
    "training.epochs": "num_train_epochs, num_epochs, n_epochs, max_epochs, train_epochs, epoch",
    "training.steps": "max_steps, num_steps, train_steps, total_steps, max_iters, num_iterations, iterations",
    "training.gradient_accumulation": "gradient_accumulation_steps, grad_accum, grad_accumulation_steps, accumulate_grad_batches, "
    "accumulation_steps",
    "training.optimizer": "optim, optimizer_type, optimizer_name",
    "training.schedule": "lr_scheduler_type, lr_scheduler, scheduler, lr_schedule, lr_decay_style",
    "training.min_learning_rate_ratio": "min_lr, min_lr_ratio, lr_min, min_lr_rate, cosine_min_lr_ratio",
    "training.warmup_steps (a number of steps, not a share)": "warmup_ratio, warmup, warmup_epochs, num_warmup_steps, lr_warmup_steps",
    "training.betas": "adam_beta1, adam_beta2, beta1, beta2, adam_betas",
    "training.eps": "adam_epsilon, epsilon, adam_eps",
    "training.weight_decay": "wd, decay, weight_decay_rate",
    "training.clip_norm": "max_grad_norm, gradient_clipping, grad_clip, clip_grad_norm, gradient_clip_val, clip_grad",
    "training.label_smoothing": "label_smoothing_factor",
    "training.compute_dtype": "bf16, fp16, tf32, torch_dtype, dtype, mixed_precision, precision, bnb_4bit_compute_dtype",
    "training.param_dtype": "pure_bf16, master_weights, master_dtype",
    "training.remat": "gradient_checkpointing, activation_checkpointing, use_gradient_checkpointing, recompute",
    "training.eval_every": "eval_steps, eval_strategy, evaluation_strategy, evals_per_epoch, eval_interval, val_check_interval",
    # adapters
    "adapter": "lora, peft, qlora, lora_config, peft_config, finetuning_type, use_peft, use_lora",
    "adapter.rank": "r, lora_r, lora_rank, lora_dim, rank_dim",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules, lora_target, lora_target_modules, lora_modules, lora_target_linear",
    "adapter.init_from": "adapter_name_or_path, lora_model_dir, adapter_path, peft_model_id, lora_path",
    # storage of frozen weights
    "quantization.format": "load_in_4bit, load_in_8bit, quantization_bit, bnb_4bit_quant_type, quant_type, quant_method, bits, quantize",
    "quantization.double": "bnb_4bit_use_double_quant, double_quant, double_quantization, use_double_quant, use_nested_quant",
    # the model
    "model.source": "model_name_or_path, base_model, model_name, model_path, model_id, pretrained_model_name_or_path, name_or_path, "
    "base_model_name_or_path, pretrained",
    "model.revision": "model_revision, revision_of_model",
    "model.experts_per_token": "num_experts_per_tok, top_k, topk, moe_top_k, num_experts_per_token",
    "model.moe_backend": "experts_implementation, moe_implementation, moe_impl",
    "model.aux_loss_coef": "router_aux_loss_coef, moe_aux_loss_coeff, aux_loss_alpha, output_router_logits, aux_loss_weight",
    "tokenizer": "tokenizer_name, tokenizer_name_or_path, tokenizer_path, processing_class, tokenizer_config",
    "added_tokens": "add_tokens, special_tokens, additional_special_tokens, new_special_tokens",
    # data
    "data": "datasets",
    "data.source": "dataset, dataset_name, dataset_path, dataset_name_or_path, data_path, train_file, train_data, train_dataset, "
    "data_files, dataset_dir",
    "data.config_name": "dataset_config, dataset_config_name, subset, dataset_subset",
    "data.split": "dataset_split, train_split, dataset_train_split, train_on_split",
    "data.template": "chat_template, prompt_template, prompt_style, template_name, dataset_type, conversation",
    "data.fields": "field, columns, column_mapping, dataset_columns",
    "data.fields.text": "dataset_text_field, text_field, text_column, field_text",
    "data.max_length": "max_seq_length, max_seq_len, cutoff_len, sequence_len, seq_len, seq_length, model_max_length, block_size",
    "data.batching": "packing, sample_packing, pack, neat_packing, group_by_length, pad_to_max_length, padding, pad_to_sequence_len",
    "data.batch_rows": "batch_size, per_device_train_batch_size, train_batch_size, micro_batch_size, per_gpu_train_batch_size, "
    "micro_batch, device_batch_size, mbs",
    "data.records": "max_samples, max_train_samples, num_samples",
    "data.shuffle": "shuffle_data, shuffle_dataset, disable_shuffling",
    "data.holdout": "val_set_size, val_size, validation_split_percentage, test_size, eval_split_size, validation_split",
    "data.eval_source": "eval_dataset, validation_file, eval_file, validation_data, test_datasets, val_dataset",
    # the run
    "runs_dir (and name, its folder there)": "output_dir, out_dir, save_dir, checkpoint_dir, work_dir, logging_dir, log_dir, results_dir",
    "name": "run_name, wandb_name, experiment_name, exp_name, project, wandb_project",
    "seed": "random_seed, data_seed, random_state",
    "checkpoint.every": "save_steps, save_strategy, saves_per_epoch, save_every, checkpoint_every, save_interval, checkpointing_steps",
    "checkpoint.keep": "save_total_limit, keep_last, max_to_keep, keep_checkpoints",
    "checkpoint.best": "load_best_model_at_end, save_best, keep_best",
    "eval.rows": "per_device_eval_batch_size, eval_batch_size",
    "eval.task": "tasks, eval_task, benchmark, metric_for_best_model",
    "eval.max_new_tokens": "eval_max_new_tokens, max_gen_toks, generation_max_length, max_tokens",
    "device.memory_fraction": "mem_fraction, xla_python_client_mem_fraction, gpu_memory_utilization",
    "the option --resume": "resume, resume_from_checkpoint, auto_resume_from_checkpoints, resume_training",
}  # fmt: skip
KEYS = {theirs: ours for ours, names in _KEYS.items() for theirs in names.split(", ")}
"""Their name -> ours, or what to say instead."""

_VALUES = {
    "bf16": "bfloat16", "fp16": "bfloat16", "float16": "bfloat16", "half": "bfloat16", "fp32": "float32", "float": "float32",
    "tf32": "float32", "4bit": "nf4", "int4": "nf4", "fp4": "nf4", "bitsandbytes": "nf4", "bnb": "nf4",
    "packing": "pack", "longest": "pad_longest", "max_length": "fixed", "chatml": "chat", "raw": "text", "completion": "text",
    "true": "full", "false": "none", "off": "none", "no": "none",
    "sgd": "adamw",
}  # fmt: skip
"""Their value -> ours; taken only where ours is one of the values that are expected."""


def ours(name: str) -> str | None:
    """What a key of another tool's is called here."""
    return KEYS.get(name.strip("-").lower().replace("-", "_"))


def nearest_value(value: Any, expected: Iterable[str]) -> str | None:
    """The one of the expected words that is meant, if one is near."""
    expected, word = list(expected), str(value).strip().lower().replace("-", "_")
    if (known := _VALUES.get(word)) in expected:
        return known
    begun = [e for e in expected if word.startswith(e) or (len(word) > 1 and e.startswith(word))]
    close = begun or difflib.get_close_matches(word, expected, n=1, cutoff=0.5)
    return max(close, key=len) if close else None
